"""How fast, as ratios measured in one run: medians of repeats, since machines are noisy. Prints a Markdown table.

    python benchmarks/speed.py                  # the bundled family; the whole of it in about five minutes on 2 cores
    python benchmarks/speed.py --no-demo --json

`train_step_vs_parts`: a training step over the sum of its plain parts (the frozen U-Net's forward and
backward to its input, the copy's forward and backward to its weights). `generate_vs_plain`: four images,
DDIM-50, over diffusers' own pipeline on the same base; `fast_vs_plain`: with `--fast`, over the same. `help`,
`mask` and `demo` are whole processes, from start to end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import StableDiffusionPipeline
from tables import machine, markdown

from p3s_cli import stages
from p3s_cli.methods import pace
from p3s_cli.paper.subject_copy import build_copy
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.family import Family, load
from p3s_cli.subject import Subject
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import lookalike_scene

BARS = {
    "train_step_vs_parts": 1.25,
    "generate_vs_plain": 2.0,
    "fast_vs_plain": 0.6,
    "help_seconds": 0.25,
    "mask_seconds": 6.0,
    "demo_seconds": 120.0,
}
PROMPT = "a {} on the beach"


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median over repeats, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def scene(folder: Path) -> tuple[Path, tuple, tuple]:
    """A photo of two look-alikes, and a click on each."""
    drawn = lookalike_scene(20_000_013)
    pixels, masks = render([drawn])
    images.save_png(folder / "two.png", images.to_pil(pixels[0]))
    return folder / "two.png", click(masks[0, 0]), click(masks[0, 1])


def parts(family: Family, batch: int) -> dict[str, Callable[[], object]]:
    """The plain halves of a training step."""
    unet, copy = family.unet, build_copy(family.unet).to(family.device)
    side, channels = unet.config.sample_size, unet.config.in_channels
    x = torch.randn(batch, channels, side, side, device=family.device)
    t = torch.randint(1000, (batch,), device=family.device)
    states = text.encode(family.tokenizer, family.text_encoder, ["a photo"] * batch)

    def frozen() -> None:
        start = x.detach().to(family.dtype).requires_grad_()
        unet(start, t, states).sample.float().square().mean().backward()

    def trained() -> None:
        with torch.autocast(family.device.split(":")[0], family.dtype, enabled=family.dtype != torch.float32):
            loss = copy(x, t, states.to(x.dtype)).sample.float().square().mean()
        loss.backward()
        copy.zero_grad(set_to_none=True)

    return {"frozen forward + backward": frozen, "copy forward + backward": trained}


def plain(family: Family, n: int, guidance: float) -> Callable[[], object]:
    """diffusers' own pipeline on the same base, scheduler and guidance."""
    scheduler = sample.build_scheduler("ddim", family.scheduler_config)
    pipe = StableDiffusionPipeline(
        family.vae,
        family.text_encoder,
        family.tokenizer,
        family.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt = PROMPT.format("dog")
    return lambda: pipe(prompt, num_images_per_prompt=n, num_inference_steps=50, guidance_scale=guidance)


def process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-m", "p3s_cli.cli", *arguments], check=True, capture_output=True)


def measure(family: Family, folder: Path, repeats: int, with_demo: bool) -> dict[str, float]:
    photo, positive, negative = scene(folder)
    root = stages.mask(photo, [positive], [negative], folder / "subject", "vase", family=family).subject
    stages.finetune(root, steps=2, family=family)
    batch, guidance = int(family.profile.finetune["batch"]), family.profile.guidance
    found = {name: seconds(work, 3 * repeats, family.device) for name, work in parts(family, batch).items()}
    found["training step"] = pace.measure("p3s", family, Subject.open(root), steps=4 * repeats).step
    found["plain, 4 images"] = seconds(plain(family, 4, guidance), repeats, family.device)

    def draw(fast: bool) -> Callable[[], object]:
        return lambda: stages.generate(root, "a [V] vase on the beach", n=4, fast=fast, family=family, force=True)

    found["generate, 4 images"] = seconds(draw(False), repeats, family.device)
    found["generate --fast, 4 images"] = seconds(draw(True), repeats, family.device)
    found["help_seconds"] = seconds(process("--help"), 5, "cpu")
    clicks = [f"--{kind}={x:g},{y:g}" for kind, (x, y) in (("pos", positive), ("neg", negative))]
    common = "--class", "vase", "--model", "world", "--force", "-o", str(folder / "again")
    found["mask_seconds"] = seconds(process("mask", str(photo), *clicks, *common), repeats, "cpu")
    if with_demo:
        started = time.perf_counter()
        process("demo", str(folder / "demo"))()
        found["demo_seconds"] = time.perf_counter() - started
    found["train_step_vs_parts"] = found["training step"] / sum(found[name] for name in parts(family, 1))
    found["generate_vs_plain"] = found["generate, 4 images"] / found["plain, 4 images"]
    found["fast_vs_plain"] = found["generate --fast, 4 images"] / found["plain, 4 images"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(load(args.model, args.device), Path(folder), args.repeats, not args.no_demo)
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        return
    rows = [{"what": name, "seconds or ratio": value, "bar": BARS.get(name, "")} for name, value in found.items()]
    print(f"{machine()}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
