"""The table of a benchmark out of its rows alone, joined from any number of files. Prints a Markdown table.

    python benchmarks/rows.py runs/bench/shard-*/scores.jsonl
    python benchmarks/rows.py runs/bench/shard-*/scores.jsonl --keep benchmarks/results/bench-world.jsonl.xz
    python benchmarks/rows.py benchmarks/results/bench-world.jsonl.xz --less p3s --columns selectivity identity prompt
    python benchmarks/rows.py benchmarks/results/bench-world.jsonl.xz --measured benchmarks/results/bench-world.measured.json \\
        --json benchmarks/results/bench-world.json --plot benchmarks/results/bench-world.png

`--less` adds by how much a method scores above each other one, image by image of the same prompt and seed. `--keep` writes
the joined rows into one compressed file, the pictures named as they lie in their folder of work. `--json` writes what
`p3s eval --json` says of them, with the seconds in `--measured`, and `--plot` its trade-off plot. Seconds an image are
those of the pace of the run: name its `--fast` or `--quick` here, too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from p3s_cli import methods
from p3s_cli.benches import world
from p3s_cli.benches.ending import BASE, numbers
from p3s_cli.benches.entries import BUDGETS, Entry, rivals
from p3s_cli.benches.evaluate import plan
from p3s_cli.benches.ledger import Ledger
from p3s_cli.benches.run import Outcome, gather
from p3s_cli.errors import InputError
from p3s_cli.evals import plot, protocols, report
from p3s_cli.evals.protocols import Protocol
from p3s_cli.evals.scores import Mean, Row, Rows, differences

Means = Mapping[str, Mapping[str, Mean]]


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows of these files, each once; `.xz` is unpacked first.

    Raises InputError where two are of one image under one name: drawn by other settings, of which none can be told.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = []
        for number, path in enumerate(paths):
            plain.append(path if path.suffix != ".xz" else Path(folder) / f"{number}.jsonl")
            if path.suffix == ".xz":
                plain[-1].write_bytes(lzma.decompress(path.read_bytes()))
        rows = list(Rows(Path(folder) / "rows.jsonl", plain))
    same = Counter((r.method, r.subject, r.prompt, r.seed, r.metric, r.protocol) for r in rows)
    what, times = same.most_common(1)[0] if same else ((), 0)
    if times > 1:
        raise InputError(
            f"there are {times} rows of {what[0]}, {what[1]}, {what[2]!r}, seed {what[3]}, {what[4]}; "
            "leave out those of other settings, or give them another name"
        )
    return rows


def keep(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, their files relative to the folder that holds them all; those kept before are so already."""
    placed = [os.path.dirname(row.file) for row in rows if os.path.isabs(row.file)]
    root = os.path.commonpath(placed) if placed else ""
    files = [os.path.relpath(row.file, root) if os.path.isabs(row.file) else row.file for row in rows]
    lines = [json.dumps(asdict(replace(row, file=f)), sort_keys=True) for row, f in zip(rows, files, strict=True)]
    path.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9))


def entries(names: Iterable[str]) -> list[Entry]:
    """Those of `p3s eval` that have these names, perhaps at a strength (`lora, equal time x0.7`); no calibration line."""
    known = {entry.name: entry for entry in rivals(methods.NAMES, methods.NAMES, BUDGETS)}
    found = []
    for name in names:
        label, _, strength = name.partition(" x")
        if label in known:
            found.append(known[label].at_strength(float(strength)) if strength else known[label])
    return found


def drawn(rows: Sequence[Row]) -> list[Row]:
    """Those of methods, and not of calibration lines."""
    return [row for row in rows if row.method not in world.CALIBRATION]


def told(rows: Sequence[Row], outcome: Outcome, how: Protocol) -> str:
    """What `p3s eval --json` says of them."""
    parts = zip(
        ("methods", "intervals", "differences"), numbers(outcome, differences(drawn(rows), how, BASE)), strict=True
    )
    return json.dumps({"protocol": how.name, **dict(parts)}, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--protocol", default="world")
    parser.add_argument("--less", metavar="METHOD")
    parser.add_argument("--columns", nargs="+", metavar="NAME")
    parser.add_argument("--measured", type=Path, nargs="+", default=[Path("none")])
    for option in ("--keep", "--json", "--plot"):
        parser.add_argument(option, type=Path)
    for option in ("--fast", "--quick"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    rows, how = read(args.rows), protocols.protocol(args.protocol)
    who = entries(dict.fromkeys(row.method for row in rows))
    pace = plan(fast=args.fast, quick=args.quick).pace
    outcome = gather(rows, who, Ledger(args.measured[0], args.measured[1:]), how, pace)
    if args.keep:
        keep(rows, args.keep)
    if args.json:
        args.json.write_text(told(rows, outcome, how) + "\n")
    if args.plot:
        curves = {entry.name: (entry.label, entry.strength) for entry in who}
        plot.trade_off(args.plot, outcome.means, how, curves, world.CALIBRATION)

    def shown(means: Means) -> Means:
        return {m: {c: mean for c, mean in row.items() if c in (args.columns or row)} for m, row in means.items()}

    print("\n".join(report.lines(shown(outcome.means), how)))
    if args.less:
        gaps = differences(drawn(rows), how, args.less)
        print("\n" + "\n".join(report.lines(shown(gaps), how, head=f"{args.less} less")))


if __name__ == "__main__":
    main()
