"""P3S on a card, at SD v1-5's exact shape with random weights: training and drawing against diffusers' own, within five minutes.

    python benchmarks/gpu.py --out FOLDER [--seconds 300] [--steps 300] [--only rates "training, captured"]
    python benchmarks/gpu.py --out FOLDER --reduced --device cpu --steps 12    # narrow models: only that all of it runs

Prints each number as it is known, and rewrites FOLDER/speed-gpu.json and .md after each part. A part that fails is told and left
out; one for which no time is left is skipped. Times of training and drawing are eager and as CUDA graphs ("captured"), and what they
are compared with is diffusers' own, in turn with them. Random weights draw noise; only speed and memory mean anything here.

The keys. Parity of captured with eager: "losses of 10 steps, ..." (relative), "what was learnt, ..." by as many steps and "pixels, ..." (levels of 255; the loss's is
half precision against autocast, a per cent or two); "recordings dropped": how often one did not hold, went on as eager, and
makes a "captured" time an eager one. Bars: "300 steps, captured, seconds" (after the first step; a shorter run's median stands for the steps
it did not make, until the whole run replaces it), train_step_vs_floor (captured; with ", eager" the other), generate_vs_plain
(eager), generate_captured_vs_plain and fast_vs_plain (captured). "peak GB, PART": the most that was held during that part alone, models
included. "the first time": with what is recorded and proved then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

STARTED = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parent.parent))  # on a machine where p3s is not installed

import torch  # noqa: E402
from gpu_drawing import PROMPT, Drawing  # noqa: E402
from gpu_report import Dropped, Report  # noqa: E402
from gpu_training import Training, tune  # noqa: E402
from sd15 import in_memory  # noqa: E402
from speed import in_turn  # noqa: E402
from tables import machine  # noqa: E402

from p3s_cli import stages  # noqa: E402
from p3s_cli.methods import p3s  # noqa: E402
from p3s_cli.sd import images  # noqa: E402
from p3s_cli.sd.devices import channels_last  # noqa: E402
from p3s_cli.sd.family import Family  # noqa: E402
from p3s_cli.subject import Subject  # noqa: E402
from p3s_cli.world import seeds  # noqa: E402
from p3s_cli.world.render import click, render  # noqa: E402
from p3s_cli.world.scenes import lookalike_scene  # noqa: E402


def rates(device: str) -> dict[str, float]:
    """TFLOP/s of one large matrix product in bfloat16, and TB/s of a copy, read and written."""
    cuda = device.startswith("cuda")
    n, size = (8192, 2**32) if cuda else (512, 2**24)
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16 if cuda else torch.float32)
    source, target = torch.zeros(2, size // 2, dtype=torch.bfloat16, device=device)
    times = in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 9, device)
    return {"matrix_TFLOPs": 2 * n**3 / times["product"] / 1e12, "copy_TBs": 2 * size / times["copy"] / 1e12}


def references(family: Family, root: Path, n: int) -> None:
    """A subject of `n` photos under their true masks, since a random vision tower finds none."""
    for i in range(n):
        pixels, masks = render([lookalike_scene(seeds.SINGLE + 13 + i)])
        photo, truth = root.parent / f"{i}.png", stages.Truth(masks[0, 0].bool(), masks[0, 1].bool())
        images.save_png(photo, images.to_pil(pixels[0]))
        points = [click(masks[0, 0])], [click(masks[0, 1])]
        stages.mask(photo, *points, root, "vase", truth=truth, family=family)


def whole(family: Family, root: Path) -> dict[str, float]:
    """The stages themselves, files and all."""
    started = time.perf_counter()
    stages.finetune(root, steps=12, memory="24", family=family)
    tuned = time.perf_counter()
    stages.generate(root, PROMPT, n=4, memory="24", family=family)
    return {
        "stage finetune, 12 steps, seconds": tuned - started,
        "stage generate, 4 images, seconds": time.perf_counter() - tuned,
    }


def levers(training: Training, drawing: Drawing) -> dict[str, float]:
    """A training step without channels last; what was not taken: kernels chosen by timing, and drawing in channels last."""
    family, found = training.family, {}

    def step() -> float:
        return tune(family, training.subject, 16, True).step * 1e3

    with mock.patch.object(p3s, "channels_last", lambda *_: contextlib.nullcontext()):
        found["training step, captured, weights as filed, ms"] = step()
    with channels_last(family.device, family.dtype, family.unet, family.vae):
        found["captured, 4 images, channels last, seconds"] = drawing.draw("captured")[-1]
    try:
        torch.backends.cudnn.benchmark = True
        found["training step, captured, cudnn.benchmark, ms"] = step()
        found["captured, 4 images, cudnn.benchmark, seconds"] = drawing.draw("captured")[-1]
    finally:
        torch.backends.cudnn.benchmark = False
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="parts that would end later are skipped")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name; some stand on what others found")
    parser.add_argument("--reduced", action="store_true", help="narrow models")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    report = Report(args.out, args.seconds, STARTED, args.only)
    print(f"{machine()}{' - REDUCED, not SD v1-5' if args.reduced else ''}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root, made = Path(folder), []

        def make() -> None:
            family = in_memory(root / "family", args.reduced, args.device)
            references(family, root / "subject", 2)
            made.append(family)

        report.part("models made and two photos masked", 6, make)
        if made:
            measure(report, *made, root / "subject", args.steps)
    print(json.dumps({name: round(value, 4) for name, value in report.found.items()}), flush=True)


def measure(report: Report, family: Family, root: Path, steps: int) -> None:
    """The parts, what matters most first, with about how long each takes on a card: an H200 whose CPU takes some 40 us a launch."""
    training = Training(family, Subject.open(root), Dropped(), steps)
    drawing = Drawing(training)
    report.part("rates", 1, lambda: rates(family.device))
    report.part("training, eager", 14, lambda: training.tuning(False))
    report.part("training, captured", 16, lambda: training.tuning(True))
    report.part("pixels, captured vs eager", 13, drawing.pixels)
    report.part("the stages", 20, lambda: whole(family, root))
    report.part("the whole run, captured", 14, training.whole_run)
    report.part("the floor", 7, lambda: training.floor(report.found["matrix_TFLOPs"]))
    report.part("plain parts", 5, training.against)
    report.part("drawing 4 images", 50, drawing.drawn)
    report.part("drawing 1 image", 18, lambda: drawing.in_turn(1, {"eager": {}, "captured": {}}, 1))
    report.part("growth of training", 18, training.growth)
    report.part("growth of drawing", 14, drawing.grown)
    report.part("levers", 24, lambda: levers(training, drawing))
    report.part("drawing without reuse", 16, drawing.every_step)
    # last, for a profiler beside graphs has been seen to end a process
    report.part("kernels", 8, training.kernels)


if __name__ == "__main__":
    main()
