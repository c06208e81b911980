"""Which eval items stand in the rows that a policy trains on: n words in common (13: Brown et al. 2020, appendix C)."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from more_itertools import map_reduce

ROWS_NAMED = 5
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+")


class Overlap(NamedTuple):
    """One eval item found in one row: its task and place there, the row's source and number, the first shared words."""

    task: str
    item: int
    source: str
    row: int
    words: str


def normal_words(text: str) -> list[str]:
    """Lower-case words without punctuation, signs and white space; each Chinese or Japanese character is a word."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlaps(
    items: Mapping[str, Sequence[tuple[str, str]]], rows: Iterable[tuple[str, int, str]], n: int = 13
) -> list[Overlap]:
    """Every item that has n words on end in common with a row, once for each row.

    items: task -> (question, reference answer) of each item; the answer may be empty. rows: (source, number of the row,
    text); a row may have several texts. A question of fewer words counts where it is a whole text; a short answer never
    does (many rows end in the same number). Words that more than half of a task's items share, and more than 10, are
    its template, and count for none. Only the items are kept in memory."""
    known: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for task, pairs in items.items():
        texts = [[normal_words(text) for text in pair] for pair in pairs]
        grams = [set(chain.from_iterable(_windows(words, n) for words in pair)) for pair in texts]
        counts, most = Counter(chain.from_iterable(grams)), max(10, len(pairs) // 2)
        for item, (own, (question, _)) in enumerate(zip(grams, texts, strict=True)):
            whole = [tuple(question)] if 0 < len(question) < n else []
            for gram in chain(whole, (gram for gram in own if counts[gram] <= most)):
                known.setdefault(gram, []).append((task, item))
    found: dict[tuple[tuple[str, int], str, int], str] = {}
    for source, row, text in rows:
        words = normal_words(text)
        grams = _windows(words, n) if len(words) >= n else [tuple(words)]
        for gram in filter(known.__contains__, grams):
            for item in known[gram]:
                found.setdefault((item, source, row), " ".join(gram))
    return [Overlap(*item, source, row, words) for (item, source, row), words in found.items()]


def _windows(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every n words on end; in this loop sliced lists take less time than `more_itertools.sliding_window`."""
    return zip(*(words[i:] for i in range(n)), strict=False)


def summary(found: Iterable[Overlap], items: Mapping[str, Sequence[object]]) -> list[dict[str, Any]]:
    """For each source and task that overlap, as JSON holds it: how many of the task's items are `contaminated`, the
    first `rows` that they are in, and the `words` in common with the first."""
    lines = []
    for (source, task), ones in map_reduce(found, attrgetter("source", "task")).items():
        counts = {"contaminated": len({one.item for one in ones}), "items": len(items[task])}
        rows, first = sorted({one.row for one in ones})[:ROWS_NAMED], min(ones, key=lambda one: one.row)
        lines.append({"source": source, "task": task, **counts, "rows": rows, "words": first.words})
    return lines
