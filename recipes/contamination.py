"""Which eval items stand in the rows that a policy trains on: n words in common (13: Brown et al. 2020, appendix C)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

ROWS_AT_ONCE, ROWS_NAMED = 256, 5
BASE, FILTER_BITS = np.uint64(0x9E3779B97F4A7C15), 24
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+")


@dataclass(frozen=True, slots=True)
class Overlap:
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
    its template, and count for none. Only the items are kept, n-grams as hashes; a hit is confirmed word by word.
    """
    names = [(task, item) for task, pairs in items.items() for item in range(len(pairs))]
    texts = [normal_words(text) for pairs in items.values() for pair in pairs for text in pair]  # item i: 2i, 2i + 1
    short: dict[str, list[int]] = {}
    for item, question in enumerate(texts[::2]):
        if 0 < len(question) < n:
            short.setdefault(" ".join(question), []).append(item)
    known, places, owners, grams = _windows(texts, n)
    tasks = np.repeat(np.arange(len(items)), np.array([len(pairs) for pairs in items.values()], int))
    order = np.lexsort((owners, grams))
    order = order[~_is_template(grams[order], owners[order] // 2, tasks)]
    places, owners, grams = places[order], owners[order] // 2, grams[order]
    shift, is_candidate = np.uint64(64 - FILTER_BITS), np.zeros(2**FILTER_BITS, bool)
    is_candidate[grams >> shift] = True
    found: dict[tuple[int, str, int], str] = {}
    stream = iter(rows)
    while chunk := [(source, row, normal_words(text)) for source, row, text in islice(stream, ROWS_AT_ONCE)]:
        for source, row, words in chunk:
            for item in short.get(" ".join(words), ()):
                found.setdefault((item, source, row), " ".join(words))
        words, starts, of, hashes = _windows([words for *_, words in chunk], n)
        hits = np.flatnonzero(is_candidate[hashes >> shift])
        ends = [np.searchsorted(grams, hashes[hits], side).tolist() for side in ("left", "right")]
        for hit, low, high in zip(hits.tolist(), *ends, strict=True):
            for at in range(low, high):
                source, row, _ = chunk[of[hit]]
                start, place, key = starts[hit], places[at], (int(owners[at]), source, row)
                if key not in found and known[place : place + n] == words[start : start + n]:
                    found[key] = " ".join(words[start : start + n])
    return [Overlap(*names[item], source, row, text) for (item, source, row), text in found.items()]


def summary(found: Iterable[Overlap], items: Mapping[str, Sequence[object]]) -> list[dict[str, Any]]:
    """For each source and task that overlap, as JSON holds it: how many of the task's items are `contaminated`, the
    first `rows` that they are in, and the `words` in common with the first."""
    groups: dict[tuple[str, str], list[Overlap]] = {}
    for one in found:
        groups.setdefault((one.source, one.task), []).append(one)
    lines = []
    for (source, task), ones in groups.items():
        counts = {"contaminated": len({one.item for one in ones}), "items": len(items[task])}
        rows, first = sorted({one.row for one in ones})[:ROWS_NAMED], min(ones, key=lambda one: one.row)
        lines.append({"source": source, "task": task, **counts, "rows": rows, "words": first.words})
    return lines


def _windows(texts: Sequence[Sequence[str]], n: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """All words; of each window of n words within one text: its place among them, its text, its (rolling) hash."""
    words = list(chain.from_iterable(texts))
    of = np.repeat(np.arange(len(texts)), np.array([len(text) for text in texts], int))
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    rolled = np.zeros(max(0, len(words) - n + 1), np.uint64)
    for j in range(n):
        rolled = rolled * BASE + hashes[j : j + len(rolled)]
    starts = np.flatnonzero(of[: len(rolled)] == of[n - 1 :])
    return words, starts, of[starts], rolled[starts]


def _is_template(grams: np.ndarray, owners: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Of each window, in the order of hashes and items, whether too many of its task's items have the same."""
    new_gram, new_task, new_owner = (np.diff(x, prepend=x[:1] + 1) != 0 for x in (grams, tasks[owners], owners))
    run = np.cumsum(new_gram | new_task) - 1
    return np.bincount(run, new_gram | new_owner)[run] > np.maximum(10, np.bincount(tasks)[tasks[owners]] // 2)
