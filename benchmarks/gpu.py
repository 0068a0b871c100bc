"""P3S on a card, at SD v1-5's exact shape with random weights: training and drawing against diffusers' own, within three minutes.

    python benchmarks/gpu.py --out FOLDER [--seconds 180] [--steps 300]
    python benchmarks/gpu.py --out FOLDER --reduced --device cpu --steps 12    # narrow models: only that all of it runs

Prints each number as it is known, and rewrites FOLDER/speed-gpu.json and .md after each part. A part that fails is told and left
out; one for which no time is left is skipped. Times of training and drawing are eager and as CUDA graphs ("captured"), and what they
are compared with is diffusers' own, in turn with them. Random weights draw noise; only speed and memory mean anything here.

The keys. Parity of captured with eager: "losses of 10 steps, ..." (relative) and "pixels, ..." (levels of 255; the loss's is
half precision against autocast, a per cent or two); "recordings dropped": how often one did not hold, went on as eager, and
makes a "captured" time an eager one. Bars: "300 steps, captured, seconds" (after the first step; a shorter run's median stands for the steps
it did not make, until the whole run replaces it), train_step_vs_floor (captured; with ", eager" the other), generate_vs_plain
(eager), generate_captured_vs_plain and fast_vs_plain (captured). "peak GB, PART": the most that was held during that part alone, models
included. "the first time": with what is recorded and proved then.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

STARTED = time.perf_counter()

import torch  # noqa: E402
from sd15 import in_memory  # noqa: E402
from speed import in_turn, parts, peak_gigabytes, plain, wait  # noqa: E402
from tables import machine, markdown  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from p3s_cli import stages  # noqa: E402
from p3s_cli.config import PACES, ControlConfig, FinetuneConfig, GenerateConfig, as_settings  # noqa: E402
from p3s_cli.methods.base import Learnt, Lesson  # noqa: E402
from p3s_cli.methods.p3s import P3S  # noqa: E402
from p3s_cli.methods.sampling import settled  # noqa: E402
from p3s_cli.sd import images, sample  # noqa: E402
from p3s_cli.sd.family import Family  # noqa: E402
from p3s_cli.subject import Subject  # noqa: E402
from p3s_cli.world import seeds  # noqa: E402
from p3s_cli.world.render import click, render  # noqa: E402
from p3s_cli.world.scenes import lookalike_scene  # noqa: E402

PROMPT = "a [V] vase on the beach"
BARS = {
    "300 steps, captured, seconds": 6.0,
    "train_step_vs_floor": 4.0,
    "generate_vs_plain": 1.9,
    "generate_captured_vs_plain": 1.35,
    "fast_vs_plain": 0.6,
}


class Report:
    """What was found, printed at once and kept on disk."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.seconds, self.found = out, seconds, {}
        out.mkdir(parents=True, exist_ok=True)

    def tell(self, **numbers: float) -> None:
        for name, value in numbers.items():
            print(
                f"{time.perf_counter() - STARTED:6.1f}  {name.replace('__', ', ').replace('_of_', ' of ')}: {value:.4g}",
                flush=True,
            )
        self.found |= numbers

    def part(self, what: str, cost: float, work: Callable[[], dict[str, float] | None]) -> None:
        """Do a part that takes about `cost` seconds on a card, if there are so many; with the most memory it took."""
        gone = time.perf_counter() - STARTED
        if gone + cost > self.seconds:
            print(f"{gone:6.1f}  {what}: skipped, no time left", flush=True)
            return
        print(f"{gone:6.1f}  -- {what}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            self.tell(**(work() or {}))
            if torch.cuda.is_available():
                self.tell(**{f"peak GB, {what}": peak_gigabytes("cuda")})
        except Exception:
            print(f"{what} failed\n{traceback.format_exc()}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        rows = [{"what": n, "found": float(v), "bar": BARS.get(n, "")} for n, v in self.found.items()]
        (self.out / "speed-gpu.json").write_text(json.dumps({n: round(v, 5) for n, v in self.found.items()}))
        if rows:
            (self.out / "speed-gpu.md").write_text(f"{machine()}\n\n{markdown(rows)}\n")


class Dropped(logging.Handler):
    """Counts the recordings that did not hold, and prints why."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        logging.getLogger("p3s_cli.methods.captured").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        print(f"        {record.getMessage()}", flush=True)


@dataclass
class Run:
    """One run of `P3S.fit`: when it began, when each step had ended, each step's loss, what was learnt."""

    started: float
    clock: list[float]
    losses: list[float]
    tensors: dict[str, torch.Tensor]

    @property
    def step(self) -> float:
        """Median seconds, but for the first steps, in which libraries warm up and graphs are recorded."""
        return median(b - a for a, b in zip(self.clock[3:], self.clock[4:], strict=False))


def tune(
    family: Family,
    subject: Subject,
    steps: int,
    captured: bool,
    at: Callable[[int], None] | None = None,
    **more: object,
) -> Run:
    """`more` is `batch`, and settings of the control; `at` hears of each step that is done."""
    batch = more.pop("batch", None)
    config = FinetuneConfig(ControlConfig(**more), steps=steps, batch=batch, captured=captured)
    run, means = Run(time.perf_counter(), [], [], {}), []

    def heard(step: int, total: int, numbers: dict[str, float]) -> None:
        run.clock.append(time.perf_counter())
        means.append(numbers.get("loss", float("nan")))
        if at:
            at(step)

    run.tensors = P3S().fit(Lesson(family, subject, config, heard))
    sums = [m * k for k, m in enumerate(means[:20], 1)]  # a mean of fewer than 50 steps is one of all
    run.losses = [b - a for a, b in zip([0.0, *sums], sums, strict=False)]
    return run


def rates(device: str) -> dict[str, float]:
    """TFLOP/s of one large matrix product in bfloat16, and TB/s of a copy, read and written."""
    cuda = device.startswith("cuda")
    n, size = (8192, 2**32) if cuda else (512, 2**24)
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16 if cuda else torch.float32)
    source, target = torch.zeros(2, size // 2, dtype=torch.bfloat16, device=device)
    times = in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 9, device)
    return {"matrix_TFLOPs": 2 * n**3 / times["product"] / 1e12, "copy_TBs": 2 * size / times["copy"] / 1e12}


def flop(family: Family, subject: Subject) -> dict[str, float]:
    """TFLOP (2 x multiply-add) of a training step, the kept ground included, attention spelt out for the counter."""
    seen: list[int] = []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tune(family, subject, 2, False, lambda step: seen.append(counter.get_total_flops()))
    return {"TFLOP of a training step": (seen[1] - seen[0]) / 1e12}


def references(family: Family, root: Path, n: int) -> None:
    """A subject of `n` photos under their true masks, since a random vision tower finds none."""
    for i in range(n):
        pixels, masks = render([lookalike_scene(seeds.SINGLE + 13 + i)])
        photo, truth = root.parent / f"{i}.png", stages.Truth(masks[0, 0].bool(), masks[0, 1].bool())
        images.save_png(photo, images.to_pil(pixels[0]))
        points = [click(masks[0, 0])], [click(masks[0, 1])]
        stages.mask(photo, *points, root, "vase", truth=truth, family=family)


class Bench:
    """The parts that measure one subject, and what a later part takes from an earlier one."""

    def __init__(self, family: Family, root: Path, report: Report, steps: int):
        self.family, self.root, self.report, self.steps = family, root, report, steps
        self.subject = Subject.open(root)
        self.runs: dict[str, Run] = {}
        self.pictures: dict[str, torch.Tensor] = {}
        self.learnt: Learnt | None = None
        self.dropped = Dropped()

    def tuning(self, captured: bool, most: int = 40) -> dict[str, float]:
        """A run of at most so many steps, which is enough for its step, and beside the eager one's losses."""
        kind, steps = "captured" if captured else "eager", min(self.steps, most)
        before = self.dropped.count
        run = self.runs[kind] = tune(self.family, self.subject, steps, captured)
        recipe = P3S().recipe(self.family.profile, FinetuneConfig(steps=steps))
        if self.learnt is None:
            halves = {n: t.to(self.family.device, torch.float16) for n, t in run.tensors.items()}
            self.learnt = Learnt(self.subject, halves, as_settings(recipe))
        run.tensors = {}
        found = {
            f"training step, {kind}, ms": run.step * 1e3,
            f"{self.steps} steps, {kind}, seconds": run.clock[-1] - run.clock[0] + (self.steps - steps) * run.step,
            f"before the first step's end, {kind}, seconds": run.clock[0] - run.started,
        }
        if captured:
            found |= {"recordings dropped in training": self.dropped.count - before} | self.losses()
        return found

    def whole_run(self) -> dict[str, float] | None:
        """Every step of a run, where recorded ones hold: eager ones were extrapolated above."""
        if self.dropped.count:
            print("        not made: a recording was dropped", flush=True)
            return None
        return self.tuning(True, self.steps)

    def against(self) -> dict[str, float]:
        """The training step over its floor, its plain parts and a LoRA step, and both kinds of it over each other."""
        found = in_turn(parts(self.family, 1), 8, self.family.device)
        plain_parts = sum(found[f"{n} forward + backward"] for n in ("frozen", "copy"))
        made = {f"{n}, ms": s * 1e3 for n, s in found.items()}
        floor = self.report.found["TFLOP of a training step"] / self.report.found["matrix_TFLOPs"]
        for kind, run in self.runs.items():
            tail = "" if kind == "captured" else ", eager"
            made[f"train_step_vs_parts{tail}"] = run.step / plain_parts
            made[f"train_step_vs_lora{tail}"] = run.step / found["LoRA step"]
            made[f"train_step_vs_floor{tail}"] = run.step / floor
        return made | {"training step's floor, ms": floor * 1e3}

    def losses(self) -> dict[str, float]:
        """Both kinds of step draw the same and begin alike; eager masters are cast by autocast, whose norms are in float32."""
        if "eager" not in self.runs:
            return {}
        pairs = list(zip(self.runs["eager"].losses[:10], self.runs["captured"].losses[:10], strict=True))
        print("losses, eager and captured:", [(round(a, 4), round(b, 4)) for a, b in pairs], flush=True)
        return {"losses of 10 steps, captured vs eager, largest difference": max(abs(b / a - 1) for a, b in pairs)}

    def draw(self, kind: str, n: int = 4, times: int = 2, steps: int | None = None, **options: object) -> list[float]:
        """Seconds of sampling and decoding `n` images under a bound subject, the first time with what is recorded then."""
        family, taken = self.family, []
        pace = asdict(PACES["fast" in kind]) | {k: v for k, v in {"steps": steps}.items() if v}
        config = GenerateConfig(**(pace | options), subject_guidance=None, captured="captured" in kind)
        config = settled(config, family.profile, self.subject, None)
        height, width = config.size or (family.profile.image_size,) * 2
        with P3S().bind(family, self.learnt, config) as generator:
            states, empty = generator.encode([PROMPT, ""]).split(1)
            for _ in range(times):
                started = time.perf_counter()
                latents = sample.sample(
                    generator.eps, states.expand(n, -1, -1), empty, sample.build_scheduler(config.scheduler, family.scheduler_config),
                    list(range(n)), (4, height // 8, width // 8), steps=config.steps, guidance=config.guidance,
                    subject_guidance=config.subject_guidance, reuse=config.reuse,
                )  # fmt: skip
                pixels = images.decode(family.vae, latents)
                _ = [images.to_pil(p) for p in pixels]
                taken.append(time.perf_counter() - started)
        self.pictures[f"{kind} {n}"] = pixels
        return taken

    def drawing(self, n: int, kinds: dict[str, dict], rounds: int) -> dict[str, float]:
        """Medians over rounds in turn with the pipeline, each after a first time that is not counted."""
        family = self.family
        pipeline, taken = plain(family, n, family.profile.guidance), {name: [] for name in ("plain", *kinds)}
        pipeline()
        first: dict[str, float] = {}
        for _ in range(rounds):
            started = time.perf_counter()
            pipeline()
            wait(family.device)
            taken["plain"].append(time.perf_counter() - started)
            print(f"        plain {taken['plain'][-1]:.3f} s", flush=True)
            for name, options in kinds.items():
                warm, *counted = self.draw(name, n, **options)
                print(f"        {name} {warm:.3f} s, then {counted[0]:.3f}", flush=True)
                first.setdefault(name, warm)
                taken[name] += counted
        found = {f"{name}, {n} images, seconds": median(t) for name, t in taken.items()}
        found |= {f"{name}, {n} images, the first time": s for name, s in first.items() if "captured" in name}
        base = found[f"plain, {n} images, seconds"]
        return found | {f"{name}, {n} images, vs plain": median(taken[name]) / base for name in kinds}

    def drawn(self) -> dict[str, float]:
        kinds = {"eager": {}, "captured": {}, "fast captured": {}, "captured, --reuse 4": {"reuse": 4}}
        found = self.drawing(4, kinds, 2)
        named = {
            "generate_vs_plain": "eager",
            "generate_captured_vs_plain": "captured",
            "fast_vs_plain": "fast captured",
        }
        return found | {key: found[f"{name}, 4 images, vs plain"] for key, name in named.items()}

    def pixels(self) -> dict[str, float]:
        """The second of two drawings is replays alone."""
        before, n = self.dropped.count, 4
        self.draw("eager", n, times=1)
        self.draw("captured", n)
        apart = (self.pictures[f"captured {n}"] - self.pictures[f"eager {n}"]).abs() * 255
        return {
            f"pixels, captured vs eager, {n} images, mean of 255": apart.mean().item(),
            f"pixels, captured vs eager, {n} images, largest of 255": apart.max().item(),
            "recordings dropped in drawing": self.dropped.count - before,
        }

    def every_step(self) -> dict[str, float]:
        """Without reuse, as the paper's preset draws."""
        return {f"{kind}, 4 images, --reuse 1, seconds": self.draw(kind, reuse=1)[-1] for kind in ("eager", "captured")}

    def kernels(self) -> dict[str, float]:
        """What one captured training step launches, by kind of kernel."""
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        marks = {8: profiler.start, 9: profiler.stop}

        def at(step: int) -> None:
            wait(self.family.device)
            marks.get(step, lambda: None)()

        tune(self.family, self.subject, 12, True, at)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
        for row in rows[:25]:
            print(f"    {row.self_device_time_total / 1e3:8.3f} ms  {row.count:5d} x {row.key[:110]}", flush=True)
        busy, count = sum(r.self_device_time_total for r in rows) / 1e3, sum(r.count for r in rows)
        return {"kernels of a captured training step": count, "the sum of their times, ms": busy}

    def growth(self) -> dict[str, float]:
        """Training at batch 4, and without the forward pass for the kept ground."""
        found = {
            f"training step, batch {n}, captured, ms": tune(self.family, self.subject, 16, True, batch=n).step * 1e3
            for n in (4,)
        }
        found["training step, batch 4, eager, ms"] = tune(self.family, self.subject, 12, False, batch=4).step * 1e3
        run = tune(self.family, self.subject, 16, True, preserve=0.0)
        found["training step without the kept ground, captured, ms"] = run.step * 1e3
        return found

    def grown(self) -> dict[str, float]:
        """Drawing of other numbers of images, references and pixels."""
        edge = self.family.profile.image_size * 3 // 2
        cases = {
            "1 image": {"n": 1},
            "2 images": {"n": 2},
            "2 references": {"n": 1, "references": 2},
            f"{edge} pixels": {"n": 1, "size": (edge, edge)},
        }
        return {
            f"12 steps and decoding, {name}, captured, seconds": self.draw("captured", steps=12, **case)[-1]
            for name, case in cases.items()
        }

    def levers(self) -> dict[str, float]:
        """What was not taken: kernels chosen by timing, and channels last."""
        found, unet = {}, self.family.unet
        try:
            for name in ("cudnn.benchmark", "cudnn.benchmark and channels last"):
                torch.backends.cudnn.benchmark = True
                if "channels" in name:
                    unet.to(memory_format=torch.channels_last)
                found[f"training step, captured, {name}, ms"] = tune(self.family, self.subject, 16, True).step * 1e3
                print(
                    f"        training step, {name} {found[f'training step, captured, {name}, ms']:.2f} ms", flush=True
                )
                found[f"captured, 4 images, {name}, seconds"] = self.draw("captured")[-1]
        finally:
            torch.backends.cudnn.benchmark = False
            unet.to(memory_format=torch.contiguous_format)
        return found

    def whole(self) -> dict[str, float]:
        """The stages themselves, files and all."""
        started = time.perf_counter()
        stages.finetune(self.root, steps=12, memory="24", family=self.family)
        tuned = time.perf_counter()
        stages.generate(self.root, PROMPT, n=4, memory="24", family=self.family)
        return {
            "stage finetune, 12 steps, seconds": tuned - started,
            "stage generate, 4 images, seconds": time.perf_counter() - tuned,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180, help="parts that would end later are skipped")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--reduced", action="store_true", help="narrow models")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    report = Report(args.out, args.seconds)
    print(f"{machine()}{' - REDUCED, not SD v1-5' if args.reduced else ''}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root, benches = Path(folder), []

        def made() -> None:
            family = in_memory(root / "family", args.reduced, args.device)
            references(family, root / "subject", 2)
            benches.append(Bench(family, root / "subject", report, args.steps))

        report.part("models made and two photos masked", 6, made)
        if benches:
            measure(report, *benches)
    print(json.dumps({name: round(value, 4) for name, value in report.found.items()}), flush=True)


def measure(report: Report, bench: Bench) -> None:
    """The parts, what matters most first, with about how long each takes on a card: an H200 whose CPU takes some 40 us a launch."""
    report.part("rates", 1, lambda: rates(bench.family.device))
    report.part("training, eager", 14, lambda: bench.tuning(False))
    report.part("training, captured", 16, lambda: bench.tuning(True))
    report.part("pixels, captured vs eager", 13, bench.pixels)
    report.part("the stages", 20, bench.whole)
    report.part("the whole run, captured", 14, bench.whole_run)
    report.part("the floor", 7, lambda: flop(bench.family, bench.subject))
    report.part("plain parts", 5, bench.against)
    report.part("drawing 4 images", 50, bench.drawn)
    report.part("kernels", 8, bench.kernels)
    report.part("drawing 1 image", 18, lambda: bench.drawing(1, {"eager": {}, "captured": {}}, 1))
    report.part("growth of training", 18, bench.growth)
    report.part("growth of drawing", 14, bench.grown)
    report.part("levers", 24, bench.levers)
    report.part("drawing without reuse", 16, bench.every_step)


if __name__ == "__main__":
    main()
