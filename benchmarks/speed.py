"""How fast, as ratios measured in one run: medians of repeats, since machines are noisy. Prints a Markdown table.

    python benchmarks/speed.py                  # the bundled family; within five minutes on 2 quiet cores
    python benchmarks/speed.py --no-demo --json
    python benchmarks/speed.py --compile        # and what --compile costs and gives, minutes more
    python benchmarks/speed.py --model FOLDER/diffusers --no-demo     # SD v1-5's shape, made by sd15.py, on a GPU

`train_step_vs_parts`: a training step over the sum of its plain parts (the frozen U-Net's forward and
backward to its input, the copy's forward and backward to its weights); also over its floor (its FLOP at the rate
of one large matrix product) and over a LoRA step of diffusers and peft. `generate_vs_plain`: four images, DDIM-50,
over diffusers' own pipeline on the same base; `fast_vs_plain`: with `--fast`, over the same. What these are
compared with is timed in turn with them. `help`, `mask` and `demo` are whole processes, from start to end.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from tables import machine, markdown
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from p3s_cli import stages
from p3s_cli.config import ControlConfig, FinetuneConfig
from p3s_cli.methods.base import Lesson
from p3s_cli.methods.p3s import P3S
from p3s_cli.paper.subject_copy import build_copy
from p3s_cli.sd import images, sample, text
from p3s_cli.sd.family import Family, load
from p3s_cli.subject import Subject
from p3s_cli.world import seeds
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
PARTS = "frozen forward + backward", "copy forward + backward"


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def in_turn(works: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each over repeats, one after the other, so that a busy machine slows all alike.

    The first round is not counted.
    """
    rounds = [once(works, device) for _ in range(repeats + 1)][1:]
    return {name: median(taken[name] for taken in rounds) for name in works}


def once(works: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Seconds of each, one after the other."""
    taken = {}
    for name, work in works.items():
        started = time.perf_counter()
        work()
        wait(device)
        taken[name] = time.perf_counter() - started
    return taken


def scenes(folder: Path, n: int) -> list[tuple[Path, tuple, tuple]]:
    """Photos of two look-alikes, with a click on each."""
    found = []
    for i in range(n):
        pixels, masks = render([lookalike_scene(seeds.SINGLE + 13 + i)])
        images.save_png(folder / f"{i}.png", images.to_pil(pixels[0]))
        found.append((folder / f"{i}.png", click(masks[0, 0]), click(masks[0, 1])))
    return found


def parts(family: Family, batch: int) -> dict[str, Callable[[], object]]:
    """The plain halves of a training step, and a LoRA step as diffusers' example has it, all encoded beforehand."""
    # copies, for a training step of P3S may come between, which puts attention of its own into the family's
    unet, adapted, trained_copy = copy.deepcopy(family.unet), copy.deepcopy(family.unet), build_copy(family.unet)
    trained_copy.to(family.device)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    factors = [p for p in adapted.parameters() if p.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    side, channels, device = unet.config.sample_size, unet.config.in_channels, family.device
    x = torch.randn(batch, channels, side, side, device=device)
    t = torch.randint(1000, (batch,), device=device)
    states = text.encode(family.tokenizer, family.text_encoder, ["a photo"] * batch)

    def step(model: torch.nn.Module, start: torch.Tensor) -> None:
        with torch.autocast(device.split(":")[0], family.dtype, enabled=family.dtype != torch.float32):
            predicted = model(start.to(family.dtype), t, states).sample
        predicted.float().square().mean().backward()

    def trained() -> None:
        step(trained_copy, x)
        trained_copy.zero_grad(set_to_none=True)

    def lora() -> None:
        step(adapted, x)
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    frozen = lambda: step(unet, x.clone().requires_grad_())  # noqa: E731
    return dict(zip(PARTS, (frozen, trained), strict=True)) | {"LoRA step": lora}


def training_step(
    family: Family,
    subject: Subject,
    steps: int,
    batch: int | None = None,
    compiled: bool = False,
    between: Callable[[], object] = lambda: None,
    **control: float,
) -> float:
    """Median seconds of a step of `P3S.fit`, after two that are not counted; `between` is done between steps, out of the count."""
    ended: list[float] = []
    begun: list[float] = []

    def heard(*_: object) -> None:
        wait(family.device)
        ended.append(time.perf_counter())
        between()
        begun.append(time.perf_counter())

    config = FinetuneConfig(ControlConfig(**control), steps=steps + 3, batch=batch, compiled=compiled)
    P3S().fit(Lesson(family, subject, config, heard))
    return median(end - begin for begin, end in zip(begun[2:], ended[3:], strict=False))


def training_floor(family: Family, subject: Subject) -> float:
    """Seconds that a training step's FLOP (2 x multiply-add) take at the rate of one large matrix product."""
    counted = []
    for steps in (1, 2):
        # attention spelt out, for not every fused kernel has a formula
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            P3S().fit(Lesson(family, subject, FinetuneConfig(steps=steps)))
        counted.append(counter.get_total_flops())
    n = 8192 if family.device.startswith("cuda") else 1024
    a, b = torch.randn(2, n, n, device=family.device).to(family.dtype)
    rate = 2 * n**3 / in_turn({"product": lambda: a @ b}, 9, family.device)["product"]
    return (counted[1] - counted[0]) / rate


def sampling_step(family: Family, root: Path, **options: object) -> float:
    """Median seconds of a step of `generate`."""
    clock: list[float] = []

    def mark(what: str, done: int, total: int) -> None:
        if what.startswith("images"):
            wait(family.device)
            clock.append(time.perf_counter())

    options = {"n": 1, "steps": 5} | options
    stages.generate(root, "a [V] vase on the beach", family=family, force=True, on_progress=mark, **options)
    return median(b - a for a, b in zip(clock, clock[1:], strict=False))


def growth(family: Family, root: Path, batch: int, repeats: int) -> dict[str, float]:
    """How a training step grows with the batch, a sampling step with images, references and size."""
    subject, edge, found = Subject.open(root), family.profile.image_size, {}
    for n in (1, 2 * batch):
        found[f"training step, batch {n}"] = training_step(family, subject, 2 * repeats, batch=n)
    for n in (1, 2, 4):
        found[f"sampling step, images {n}"] = sampling_step(family, root, n=n)
    for n in (2, 3):
        found[f"sampling step, references {n}"] = sampling_step(family, root, references=n)
    for size in (edge * 3 // 2, edge * 2):
        found[f"sampling step, {size} pixels"] = sampling_step(family, root, size=f"{size}x{size}")
    return found


def peak_gigabytes(device: str) -> float:
    """The most memory so far: of the card where there is one, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plain(family: Family, n: int, guidance: float) -> Callable[[], object]:
    """diffusers' own pipeline on the same base, scheduler and guidance."""
    scheduler = sample.build_scheduler("ddim", family.scheduler_config)
    models = family.vae, family.text_encoder, family.tokenizer, family.unet
    pipe = StableDiffusionPipeline(*models, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prompt = PROMPT.format("dog")
    return lambda: pipe(prompt, num_images_per_prompt=n, num_inference_steps=50, guidance_scale=guidance)


def process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-m", "p3s_cli.cli", *arguments], check=True, capture_output=True)


def training(family: Family, subject: Subject, repeats: int) -> dict[str, float]:
    """A training step beside its parts and a LoRA step, a round of which comes between any two steps."""
    works = parts(family, int(family.profile.finetune["batch"]))

    def timed(**control: float) -> tuple[float, dict[str, float]]:
        rounds: list[dict[str, float]] = []
        between = lambda: rounds.append(once(works, family.device))  # noqa: E731
        step = training_step(family, subject, 4 * repeats, between=between, **control)
        return step, {name: median(taken[name] for taken in rounds[2:]) for name in works}

    (step, found), (without, beside) = timed(), timed(preserve=0.0)
    floor = training_floor(family, subject)
    return found | {
        "training step": step,
        "training step without the kept ground": without,
        "training step's floor": floor,
        "train_step_vs_parts": step / sum(found[n] for n in PARTS),
        "train_step_vs_floor": step / floor,
        "train_step_vs_lora": step / found["LoRA step"],
        "train_step_vs_parts without the kept ground": without / sum(beside[n] for n in PARTS),
    }


def drawing(family: Family, root: Path, repeats: int) -> dict[str, float]:
    def draw(fast: bool) -> Callable[[], object]:
        return lambda: stages.generate(root, "a [V] vase on the beach", n=4, fast=fast, family=family, force=True)

    works = {"plain, 4 images": plain(family, 4, family.profile.guidance), "generate, 4 images": draw(False)}
    found = in_turn(works | {"generate --fast, 4 images": draw(True)}, repeats, family.device)
    for name, what in (("generate_vs_plain", "generate"), ("fast_vs_plain", "generate --fast")):
        found[name] = found[f"{what}, 4 images"] / found["plain, 4 images"]
    return found


def compiling(family: Family, root: Path, repeats: int) -> dict[str, float]:
    """What `--compile` costs before the first step, and what each step and image takes then; plain ones in turn."""

    def draw(compiled: bool) -> Callable[[], object]:
        options = {"n": 4, "fast": True, "compiled": compiled, "family": family, "force": True}
        return lambda: stages.generate(root, "a [V] vase on the beach", **options)

    def train(compiled: bool) -> float:
        return training_step(family, Subject.open(root), 4 * repeats, compiled=compiled)

    found: dict[str, float] = {}
    for name, work in (("a training step", lambda: train(True)), ("generate --fast", draw(True))):
        started = time.perf_counter()
        work()
        first = time.perf_counter() - started
        started = time.perf_counter()
        work()
        found[f"compiling {name}"] = first - (time.perf_counter() - started)
    turns = [(train(False), train(True)) for _ in range(3)]
    found["training step, compiled vs plain"] = median(b / a for a, b in turns)
    drawn = in_turn({"plain": draw(False), "compiled": draw(True)}, repeats, family.device)
    return found | {"generate --fast, compiled vs plain": drawn["compiled"] / drawn["plain"]}


def processes(folder: Path, scene: tuple[Path, tuple, tuple], repeats: int, with_demo: bool) -> dict[str, float]:
    photo, positive, negative = scene
    clicks = [f"--{kind}={x:g},{y:g}" for kind, (x, y) in (("pos", positive), ("neg", negative))]
    common = "--class", "vase", "--model", "world", "--force", "-o", str(folder / "again")
    found = in_turn({"help_seconds": process("--help")}, 5, "cpu")
    found |= in_turn({"mask_seconds": process("mask", str(photo), *clicks, *common)}, repeats, "cpu")
    if with_demo:
        started = time.perf_counter()
        process("demo", str(folder / "demo"))()
        found["demo_seconds"] = time.perf_counter() - started
    return found


def measure(family: Family, folder: Path, repeats: int, with_demo: bool, with_compile: bool) -> dict[str, float]:
    root, given = folder / "subject", scenes(folder, 3)
    for photo, positive, negative in given:
        stages.mask(photo, [positive], [negative], root, "vase", family=family)
    stages.finetune(root, steps=2, family=family)
    found = training(family, Subject.open(root), repeats)
    found["peak GB after training"] = peak_gigabytes(family.device)
    if family.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    found |= drawing(family, root, repeats)
    found["peak GB after drawing"] = peak_gigabytes(family.device)
    found |= growth(family, root, int(family.profile.finetune["batch"]), repeats)
    if with_compile:
        found |= compiling(family, root, repeats)
    return found | processes(folder, given[0], repeats, with_demo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also what compiling costs and gives")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(load(args.model, args.device), Path(folder), args.repeats, not args.no_demo, args.compile)
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        return
    rows = [{"what": name, "seconds or ratio": value, "bar": BARS.get(name, "")} for name, value in found.items()]
    print(f"{machine()}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
