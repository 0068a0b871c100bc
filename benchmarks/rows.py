"""The table of a benchmark out of its rows alone, joined from any number of files. Prints a Markdown table.

    python benchmarks/rows.py runs/bench/shard-*/scores.jsonl
    python benchmarks/rows.py runs/bench/shard-*/scores.jsonl --keep benchmarks/results/bench-world.jsonl.xz
    python benchmarks/rows.py benchmarks/results/bench-world.jsonl.xz

    python benchmarks/rows.py benchmarks/results/bench-world.jsonl.xz --less p3s

`--less` adds by how much a method scores above each other one, image by image of the same prompt and seed. `--keep` writes the joined rows into one compressed file, the pictures named as they lie in their folder of work.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from p3s_cli.evals import protocols, report
from p3s_cli.evals.scores import Row, Rows, differences, table


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows of these files, each once; `.xz` is unpacked first."""
    with tempfile.TemporaryDirectory() as folder:
        plain = []
        for number, path in enumerate(paths):
            plain.append(path if path.suffix != ".xz" else Path(folder) / f"{number}.jsonl")
            if path.suffix == ".xz":
                plain[-1].write_bytes(lzma.decompress(path.read_bytes()))
        return list(Rows(Path(folder) / "rows.jsonl", plain))


def keep(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, their files relative to the folder that holds them all."""
    root = os.path.commonpath([os.path.dirname(row.file) for row in rows])
    lines = [json.dumps(asdict(replace(row, file=os.path.relpath(row.file, root))), sort_keys=True) for row in rows]
    path.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--protocol", default="world")
    parser.add_argument("--less", metavar="METHOD")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    rows, how = read(args.rows), protocols.protocol(args.protocol)
    if args.keep:
        keep(rows, args.keep)
    print("\n".join(report.lines(table(rows, how), how)))
    if args.less:
        print("\n" + "\n".join(report.lines(differences(rows, how, args.less), how, head=f"{args.less} less")))


if __name__ == "__main__":
    main()
