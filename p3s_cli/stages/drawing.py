"""The work behind `stages.generate`: the subject under its method, latents sampled and decoded, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from p3s_cli import __version__, methods
from p3s_cli import config as settings
from p3s_cli.errors import P3SError
from p3s_cli.methods.base import Generator, Joining, Learnt, SubjectPart
from p3s_cli.sd import a1111, controlnet, images, lora, safety, sample
from p3s_cli.sd.family import Family
from p3s_cli.stages.composition import Composition
from p3s_cli.stages.progress import Progress
from p3s_cli.subject import Subject


@dataclass(frozen=True)
class Order:
    """What is drawn; the images of one order differ by their seed alone. Both strengths in `sampling` are settled."""

    family: Family
    subject: Subject
    joined: Composition
    prompt: str  # with [V] in it
    words: str  # the same, identifiers in the place of [V]
    sampling: settings.GenerateConfig
    safety_checker: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.sampling.size or (self.family.profile.image_size,) * 2


def draw(
    order: Order, seeds: Sequence[int], missing: Sequence[int], memory: settings.MemoryProfile, report: Progress
) -> Iterator[tuple[int, Tensor, str]]:
    """Yield (seed, image (3, H, W), safety) of the missing seeds as each batch is done.

    Batches are cut from all seeds, because in a batch of another size a kernel may round otherwise. Raises
    P3SError in the end, naming the seeds, if images came out with numbers that are not finite.
    """
    family, failed = order.family, []
    if order.safety_checker:
        safety.ready(family)
    guides = [
        controlnet.load_guide(family, name, images.load_image(path), strength, order.size)
        for name, path, strength in order.joined.control
    ]
    with _bound(order) as generator, lora.applied(family, order.joined.lora):
        texts = generator.encode([order.prompt, order.sampling.negative_prompt]).split(1)
        for first in range(0, len(seeds), memory.images):
            batch = seeds[first : first + memory.images]
            if not set(batch) & set(missing):
                continue
            on_step = _step_report(report, first, len(batch), len(seeds))
            with family.resting() if memory.offload else contextlib.nullcontext():
                latents = _latents(order, generator, texts, batch, guides, on_step)
            decoded = images.decode(family.vae, latents, memory.images)
            finite = torch.isfinite(decoded).flatten(1).all(1)
            failed += [s for s, whole in zip(batch, finite, strict=True) if not whole]
            wanted = [i for i, s in enumerate(batch) if s in missing and finite[i]]
            if wanted:
                yield from zip([batch[i] for i in wanted], *_checked(order, decoded[wanted]), strict=True)
    if failed:
        raise P3SError(f"the images of seeds {failed} came out with numbers that are not finite; try --dtype float32")


def _latents(
    order: Order,
    generator: Generator,
    texts: Sequence[Tensor],
    seeds: Sequence[int],
    guides: Sequence[controlnet.Guide],
    on_step: Callable[[int, int], None],
) -> Tensor:
    """(B, 4, h, w), one for each seed; `texts` are the states of the prompt and of the negative one, each (1, 77, D)."""
    (states, empty), sampling, (height, width) = texts, order.sampling, order.size
    assert sampling.guidance is not None and sampling.subject_guidance is not None
    return sample.sample(
        generator.eps,
        states.expand(len(seeds), -1, -1),
        empty,
        sample.build_scheduler(sampling.scheduler, order.family.scheduler_config),
        seeds,
        (order.family.unet.config.out_channels, height // 8, width // 8),
        steps=sampling.steps,
        guidance=sampling.guidance,
        subject_guidance=sampling.subject_guidance,
        on_step=on_step,
        control=controlnet.speaker(guides),
        reuse=sampling.reuse,
    )


def _checked(order: Order, decoded: Tensor) -> tuple[Tensor, list[str]]:
    """The images (B, 3, H, W) as the safety checker lets them through, and its word on each."""
    return safety.check(order.family, decoded) if order.safety_checker else (decoded, ["off"] * len(decoded))


def parameters(order: Order, seed: int) -> str:
    """A1111's text for the image of a seed."""
    sampling = order.sampling
    assert sampling.guidance is not None and sampling.subject_guidance is not None
    return a1111.parameters(
        order.words,
        sampling.negative_prompt,
        steps=sampling.steps,
        sampler=sampling.scheduler,
        guidance=sampling.guidance,
        seed=seed,
        size=order.size,
        model=order.family.profile.name,
        version=f"p3s {__version__}",
        loras=[(path.stem, strength) for path, strength in order.joined.lora],
    )


def _bound(order: Order) -> AbstractContextManager[Generator]:
    """The subject under the method it was tuned with, and what joins it."""
    family, method, first = order.family, methods.get(order.subject.method), Learnt.read(order.subject)
    if not order.joined.also:
        return method.bind(family, first, order.sampling)
    parts = [SubjectPart(first), *(SubjectPart(Learnt.read(s), strength) for s, strength in order.joined.also)]
    return cast(Joining, method).bind_many(family, parts, order.sampling)  # `Composition.check` has seen to it


def _step_report(report: Progress, first: int, count: int, total: int) -> Callable[[int, int], None]:
    return lambda step, steps: report(
        f"images {first + 1}-{first + count} of {total}", first * steps + step * count, total * steps
    )
