"""What every stage of the recipe shares: step counts, where a run's files are, the way it trains and reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from p3s_cli.sd.captured import CapturedLoss
from p3s_cli.sd.graphs import possible
from p3s_cli.sd.train import Checkpoint, Recipe, train
from p3s_cli.world.recipe.pool import Pool
from p3s_cli.world.recipe.tokens import Tokens
from p3s_cli.world.scenes import (
    each_pattern,
    sample_scene,
)
from p3s_cli.world.shapes import PATTERNS


@dataclass(frozen=True)
class Length:
    """How long a stage trains: steps of so many samples, at which rate."""

    steps: int
    batch: int
    lr: float


LENGTH = {
    "vae": Length(3_600, 64, 2e-3),
    "clip": Length(1_400, 192, 1e-3),
    "words": Length(900, 128, 1e-3),
    "vision": Length(2_400, 384, 7e-4),
    "vision_fresh": Length(420, 384, 3e-4),
    "unet": Length(1_500, 512, 1e-3),
    "reward": Length(4_000, 256, 2e-3),
    "unet_reward": Length(400, 384, 2e-4),
    "labels": Length(4_000, 256, 3e-3),
    "identity": Length(2_000, 256, 2e-3),
}
SCENES = 131_072


Draw = Callable[[int, torch.Generator], Any]
Compute = Callable[[Any, nn.Module], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Lessons:
    """A stage's loss in its two halves (`sd.captured.Stepwise`): `draw` (step, generator), all that is random, and
    `compute` (drawn, module)."""

    module: nn.Module
    draw: Draw
    compute: Compute

    def judge(self, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(drawn, self.module)

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.judge(self.draw(step, generator))


class Workshop:
    """One run of the recipe: where its files are, on which device, how it reports."""

    def __init__(
        self,
        work: Path,
        device: str,
        seed: int,
        scenes: int,
        steps: int | None = None,
        batch: int | None = None,
        until: int | None = None,
        compiled: bool = False,
    ):
        self.work, self.device, self.seed, self.until, self.compiled = work, device, seed, until, compiled
        self._asked = {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
        self.family = work / "family"
        self._scenes = scenes

    @cached_property
    def pool(self) -> Pool:
        return Pool([sample_scene(seed) for seed in range(self._scenes)], self.device)

    @cached_property
    def patterns(self) -> Pool:
        """A quarter as many scenes, each in every pattern; a scene's four are in a row."""
        seeds = range(self._scenes // len(PATTERNS))
        return Pool([scene for seed in seeds for scene in each_pattern(sample_scene(seed))], self.device)

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(CLIPTokenizer.from_pretrained(self.family / "tokenizer"))

    def log(self, stage: str, row: dict) -> None:
        line = json.dumps({"stage": stage, **row})
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "log.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def autocast(self):
        """bfloat16, but on a processor without AVX-512, which emulates it some twenty times as slowly as float32."""
        kind = self.device.split(":")[0]
        fast = kind != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return torch.autocast(kind, torch.bfloat16, enabled=fast)

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Drawn on the device, where it is needed, from a seed of the step's own generator."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        there = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=there, device=self.device)

    def length(self, stage: str) -> Length:
        """The recipe's, but for what this run was asked for."""
        return replace(LENGTH[stage], **self._asked)

    def ended(self, stage: str) -> bool:
        """Whether this run takes the stage to its end, and not only `until` a step before."""
        return self.until is None or self.until >= self.length(stage).steps

    def checkpoints(self, stage: str) -> Path:
        """Where the states of the stage's run are kept. What decides it is in the name, so that a run never goes on from another."""
        length = self.length(stage)
        return self.work / "checkpoints" / f"{stage}-{self.seed}-{self._scenes}-{length.steps}x{length.batch}"

    def fit(self, stage: str, module: nn.Module, draw: Draw, compute: Compute, weight_decay: float, ema: float) -> None:
        """Train what of `module` requires gradients, leaving the weights to keep in it; on a card each step is one graph."""
        length, lessons = self.length(stage), Lessons(module, draw, compute)
        recipe = Recipe(
            length.steps,
            length.lr,
            weight_decay,
            warmup=min(200, length.steps // 10),
            decay="cosine",
            ema=ema,
            seed=self.seed,
            betas=(0.9, 0.99),
        )
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        graphed = possible(self.device, length.steps) and not self.compiled
        loss = CapturedLoss(lessons, module, torch.float32) if graphed else lessons
        told = self._teller(stage, length.batch)
        keep = train(trained, loss, recipe, told, Checkpoint(self.checkpoints(stage), 90), self.until)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(keep[name])

    def _teller(self, stage: str, batch: int) -> Callable[[int, int, dict[str, float]], None]:
        """Logs every fiftieth step and the last, with the pace since the first it heard of."""
        started, first = time.monotonic(), [None]

        def on_step(step: int, total: int, numbers: dict[str, float]) -> None:
            first[0] = first[0] or step
            if step % 50 == 0 or step == total:
                rate = (step - first[0] + 1) * batch / (time.monotonic() - started)
                row = {"step": step, "of": total, "samples_per_s": round(rate, 1)}
                self.log(stage, row | {k: round(v, 5) for k, v in numbers.items()})

        return on_step
