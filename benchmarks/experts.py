"""Sparse expert layer: every dispatch backend against the loop and a dense layer.

python benchmarks/experts.py [--cases S2 fine64] [--threads 1] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coterie.experts.benchmark import CASES, run_benchmark

COLUMNS = ("vs_dense", "vs_loop", "vs_best", "train_vs_dense", "train_vs_loop", "train_vs_best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = run_benchmark(args.cases, args.threads, args.rounds)
    print(f"{'case':14}{'backend':12}{'fwd ms':>9}{'train ms':>9}", *(f"{c:>14}" for c in COLUMNS))
    for row in rows:
        numbers = (row["forward_ms"], row["train_ms"], *(row[c] for c in COLUMNS))
        cells = ["-" if value is None else f"{value:.2f}" for value in numbers]
        print(
            f"{row['case']:14}{row['backend']:12}{cells[0]:>9}{cells[1]:>9}",
            *(f"{cell:>14}" for cell in cells[2:]),
            row.get("choice", ""),
        )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
