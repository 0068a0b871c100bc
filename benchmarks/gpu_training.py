"""Training on a card: one subject's steps, eager and as CUDA graphs, against their floor and their plain parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from gpu_report import Dropped
from speed import in_turn, parts, wait
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from p3s_cli.config import ControlConfig, FinetuneConfig, as_settings
from p3s_cli.methods.base import Learnt, Lesson
from p3s_cli.methods.p3s import P3S
from p3s_cli.sd.family import Family
from p3s_cli.subject import Subject


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


def flop(family: Family, subject: Subject) -> dict[str, float]:
    """TFLOP (2 x multiply-add) of a training step, the kept ground included, attention spelt out for the counter."""
    seen: list[int] = []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tune(family, subject, 2, False, lambda step: seen.append(counter.get_total_flops()))
    return {"TFLOP of a training step": (seen[1] - seen[0]) / 1e12}


class Training:
    """The parts that train on one subject; `learnt` is what the first of them left, for whoever draws."""

    def __init__(self, family: Family, subject: Subject, dropped: Dropped, steps: int):
        self.family, self.subject, self.dropped, self.steps = family, subject, dropped, steps
        self.runs: dict[str, Run] = {}
        self.learnt: Learnt | None = None
        self.holds = False  # whether the last recorded run was recorded to its end

    def tuning(self, captured: bool, most: int = 40) -> dict[str, float]:
        """A run of at most so many steps, which is enough for its step, and beside the eager one's losses."""
        kind, steps = "captured" if captured else "eager", min(self.steps, most)
        before = self.dropped.count
        run = self.runs[kind] = tune(self.family, self.subject, steps, captured)
        recipe = P3S().recipe(self.family.profile, FinetuneConfig(steps=steps))
        if self.learnt is None:
            halves = {n: t.to(self.family.device, torch.float16) for n, t in run.tensors.items()}
            self.learnt = Learnt(self.subject, halves, as_settings(recipe))
        # what is zero before the first step is, after the last, all that was learnt
        run.tensors = {name: t for name, t in run.tensors.items() if name.startswith("zero_")}
        found = {
            f"training step, {kind}, ms": run.step * 1e3,
            f"{self.steps} steps, {kind}, seconds": run.clock[-1] - run.clock[0] + (self.steps - steps) * run.step,
            f"before the first step's end, {kind}, seconds": run.clock[0] - run.started,
        }
        if captured:
            self.holds = self.dropped.count == before
            found |= {"recordings dropped in training": self.dropped.count - before} | self.losses() | self.learning()
        return found

    def whole_run(self) -> dict[str, float] | None:
        """Every step of a run, where recorded ones hold: eager ones were extrapolated above."""
        if not self.holds:
            print("        not made: the recording was dropped", flush=True)
            return None
        return self.tuning(True, self.steps)

    def against(self) -> dict[str, float]:
        """The training step over its plain parts and a LoRA step."""
        found = in_turn(parts(self.family, 1), 8, self.family.device)
        plain_parts = sum(found[f"{n} forward + backward"] for n in ("frozen", "copy"))
        made = {f"{n}, ms": s * 1e3 for n, s in found.items()}
        for kind, run in self.runs.items():
            tail = "" if kind == "captured" else ", eager"
            made[f"train_step_vs_parts{tail}"] = run.step / plain_parts
            made[f"train_step_vs_lora{tail}"] = run.step / found["LoRA step"]
        return made

    def floor(self, rate: float) -> dict[str, float]:
        """The FLOP of a step, the time that they take at this rate, in TFLOP/s, and both kinds of step over it."""
        made = flop(self.family, self.subject)
        floor = made["TFLOP of a training step"] / rate
        for kind, run in self.runs.items():
            made[f"train_step_vs_floor{'' if kind == 'captured' else ', eager'}"] = run.step / floor
        return made | {"training step's floor, ms": floor * 1e3}

    def losses(self) -> dict[str, float]:
        """Both kinds of step draw the same and begin alike; eager masters are cast by autocast, whose norms are in float32."""
        if "eager" not in self.runs:
            return {}
        pairs = list(zip(self.runs["eager"].losses[:10], self.runs["captured"].losses[:10], strict=True))
        print("losses, eager and captured:", [(round(a, 4), round(b, 4)) for a, b in pairs], flush=True)
        return {"losses of 10 steps, captured vs eager, largest difference": max(abs(b / a - 1) for a, b in pairs)}

    def learning(self) -> dict[str, float]:
        """What as many steps of both kinds have moved the zero convolutions by; ten losses hardly depend on it."""
        eager, captured = (self.runs[kind] if kind in self.runs else None for kind in ("eager", "captured"))
        if eager is None or len(eager.clock) != len(captured.clock):
            return {}
        a, b = (torch.cat([t.flatten().float() for _, t in sorted(r.tensors.items())]) for r in (eager, captured))
        return {
            "what was learnt, captured with eager, cosine": torch.cosine_similarity(a, b, dim=0).item(),
            "what was learnt, captured over eager, length": (b.norm() / a.norm()).item(),
        }

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
        four = {
            kind: tune(self.family, self.subject, steps, kind == "captured", batch=4)
            for kind, steps in (("captured", 16), ("eager", 12))
        }
        found = {f"training step, batch 4, {kind}, ms": run.step * 1e3 for kind, run in four.items()}
        run = tune(self.family, self.subject, 16, True, preserve=0.0)
        found["training step without the kept ground, captured, ms"] = run.step * 1e3
        return found
