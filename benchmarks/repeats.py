"""Does the recipe of the bundled family repeat itself? Prints a Markdown table.

    python benchmarks/repeats.py --device cuda                               # every stage, as CUDA graphs
    python benchmarks/repeats.py --steps 3 --batch 8 --scenes 256 vae unet   # some stages, on a CPU

Each stage is trained for a few steps from the same beginning, in two processes, and what their checkpoints
hold (weights, averages, moments) is compared bit by bit; `apart` is how far their weights are from each other, in units of their
norm. On a card a third run makes the same steps without CUDA graphs, and `eager` is how far the recorded weights are from those; the
three are at work at the same time there, on a CPU one after the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from tables import machine, markdown
from torch import Tensor

from p3s_cli.sd import checkpoints
from p3s_cli.sd.determinism import exact
from p3s_cli.world.recipe.__main__ import STAGES
from p3s_cli.world.recipe.export import stage_reopen
from p3s_cli.world.recipe.workshop import Workshop

TRAINED = [name for name in STAGES if name not in ("tokenizer", "export")]


def trained(name: str) -> str:
    if name not in TRAINED:
        raise argparse.ArgumentTypeError(f"no trained stage is called {name!r}")
    return name


def recipe(work: Path, stages: list[str], options: list[str]) -> subprocess.Popen:
    """A process of its own, as whoever trains the family has it."""
    command = [sys.executable, "-m", "p3s_cli.world.recipe", "reopen", *stages, "--work", str(work), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def ended(process: subprocess.Popen) -> None:
    """Raises CalledProcessError where it did not end well."""
    if code := process.wait():
        raise subprocess.CalledProcessError(code, process.args)


def without_graphs(work: Path, stages: list[str], args: argparse.Namespace) -> None:
    shop = Workshop(work, args.device, 0, args.scenes, args.steps, args.batch)
    with exact(True), mock.patch("p3s_cli.world.recipe.workshop.possible", lambda device, steps: False):
        for stage in (stage_reopen, *(STAGES[name] for name in stages)):
            stage(shop)


def state(work: Path, stage: str) -> dict[str, Tensor]:
    """What the stage's checkpoint holds. Raises RuntimeError if it has left none."""
    (folder,) = (work / "checkpoints").glob(f"{stage}-*")
    found = checkpoints.newest(folder)
    if found is None:
        raise RuntimeError(f"stage {stage} has left no checkpoint in {work}")
    return found[0]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two runs' weights, over that of the second's."""
    weights = [name for name in one if name.startswith("param/")]
    between = sum((one[n].double() - other[n].double()).square().sum() for n in weights)
    size = sum(other[n].double().square().sum() for n in weights)
    return float((between / size).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # `choices` would not let it be empty in Python 3.11
    parser.add_argument("stage", nargs="*", type=trained, help=f"of {', '.join(TRAINED)}; default all of these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    asked = args.stage or TRAINED
    stages = [name for name in TRAINED if name in asked]  # in their order: some need what others leave
    options = [f"--{n}={getattr(args, n)}" for n in ("device", "steps", "batch", "scenes")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first, second, eager = (Path(folder) / name for name in ("first", "second", "eager"))
        if args.device == "cpu":
            for work in (first, second):
                ended(recipe(work, stages, options))
        else:
            runs = [recipe(work, stages, options) for work in (first, second)]
            without_graphs(eager, stages, args)
            for run in runs:
                ended(run)
        for stage in stages:
            one, other = state(first, stage), state(second, stage)
            differing = [name for name in one if not torch.equal(one[name], other[name])]
            row = {"stage": stage, "tensors": len(one), "differing": len(differing), "apart": apart(one, other)}
            rows.append(row | ({"eager": apart(one, state(eager, stage))} if args.device != "cpu" else {}))
    print(json.dumps(rows) if args.json else f"{machine()}, {args.steps} steps of {args.batch}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
