"""How long the search for eval items in training rows takes.

    python benchmarks/contamination.py [--rows 1000000] [--words 100] [--items 14000]      2 minutes, 1 core, under 1 GB

Rows are random words of a 50,000-word vocabulary, made on the way (their time is taken off); every 1,000th holds 30
words of an item. The items are as many and as long as MMLU's.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.pop(0)  # this folder, whose files are no modules of the product
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import machine_line
from recipes.contamination import overlaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("words", 100), ("items", 14_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(50_000)]
    items = [draw.choices(vocabulary, k=60) for _ in range(args.items)]
    texts = [(" ".join(words), "") for words in items]
    making = 0.0

    def rows() -> Iterator[tuple[str, int, str]]:
        nonlocal making
        for row in range(args.rows):
            begun = time.perf_counter()
            words = draw.choices(vocabulary, k=args.words)
            if row % 1000 == 0:
                words[20:50] = items[row // 1000 % len(items)][5:35]
            text = ", ".join(words).capitalize()
            making += time.perf_counter() - begun
            yield "rows", row, text

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    found = overlaps({"items": texts}, rows())
    seconds = time.perf_counter() - begun - making
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(machine_line())
    print(f"{args.rows:,} rows of {args.words} words, {args.items:,} items: {seconds:.1f} s, {grown:,.0f} MB")
    planted = -(-args.rows // 1000)
    print(f"{len(found):,} rows found, {planted:,} planted")


if __name__ == "__main__":
    main()
