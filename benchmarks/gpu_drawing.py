"""Drawing on a card: one tuned subject's images, eager and as CUDA graphs, against diffusers' own pipeline."""

from __future__ import annotations

import time
from dataclasses import asdict
from statistics import median

import torch
from gpu_training import Training
from speed import plain, wait

from p3s_cli.config import PACES, GenerateConfig
from p3s_cli.methods.p3s import P3S
from p3s_cli.methods.sampling import settled
from p3s_cli.sd import images, sample

PROMPT = "a [V] vase on the beach"


class Drawing:
    """The parts that draw what was trained; `pictures` are the last of each kind."""

    def __init__(self, training: Training):
        self.training, self.family, self.dropped = training, training.family, training.dropped
        self.pictures: dict[str, torch.Tensor] = {}

    def draw(self, kind: str, n: int = 4, times: int = 2, steps: int | None = None, **options: object) -> list[float]:
        """Seconds of sampling and decoding `n` images under a bound subject, the first time with what is recorded then."""
        family, taken = self.family, []
        pace = asdict(PACES["fast" in kind]) | {k: v for k, v in {"steps": steps}.items() if v}
        config = GenerateConfig(**(pace | options), subject_guidance=None, captured="captured" in kind)
        config = settled(config, family.profile, self.training.subject, None)
        height, width = config.size or (family.profile.image_size,) * 2
        with P3S().bind(family, self.training.learnt, config) as generator:
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

    def in_turn(self, n: int, kinds: dict[str, dict], rounds: int) -> dict[str, float]:
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
        found = self.in_turn(4, kinds, 2)
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
