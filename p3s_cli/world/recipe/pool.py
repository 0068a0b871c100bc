"""Training scenes, as pictures and as captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.world.render import render
from p3s_cli.world.scenes import BACKGROUNDS, Scene, Wording, caption, short_caption

AT_ONCE = 8_192  # scenes a card paints in the time it takes for 1,000: what counts is how often Python asks


class Pool:
    """Training scenes with fresh captions at every visit; drawn at first need and kept as bytes."""

    def __init__(self, scenes: list[Scene], device: str):
        self.device, self.scenes = device, scenes
        self._by_place = {
            b: torch.tensor([i for i, s in enumerate(self.scenes) if s.background == b]) for b in BACKGROUNDS
        }

    @property
    def images(self) -> Tensor:
        """(N, 3, 128, 128), bytes."""
        return self._drawn[0]

    @property
    def subjects(self) -> Tensor:
        """(N, 1, 16, 16), the share of each latent pixel that is subject, in 0..255."""
        return self._drawn[1]

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        images, subjects = [], []
        at_once = at_a_time(self.device, AT_ONCE)
        for i in range(0, len(self.scenes), at_once):
            pixels, masks = render(self.scenes[i : i + at_once], self.device)
            images.append((255 * pixels).round().to(torch.uint8))
            subjects.append((255 * F.avg_pool2d(masks.any(1, keepdim=True).float(), 8)).round().to(torch.uint8))
        return torch.cat(images), torch.cat(subjects).cpu()

    def bytes(self, index: Tensor) -> Tensor:
        """(B, 3, 128, 128), as they are kept."""
        return self.images[index.to(self.device)]

    def pixels(self, index: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1]."""
        return as_pixels(self.bytes(index))

    def shares(self, index: Tensor) -> Tensor:
        """(B, 1, 16, 16) on the device, how much of each latent pixel, which is also a patch, is subject."""
        return self.subjects[index].to(self.device).float() / 255

    def captions(self, index: Tensor, generator: torch.Generator) -> list[str]:
        return captions([self.scenes[i] for i in index.tolist()], generator)

    def draw_at(self, place: str, n: int, generator: torch.Generator) -> Tensor:
        """Scenes of one background."""
        rows = self._by_place[place]
        return rows[torch.randint(len(rows), (n,), generator=generator)]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.scenes), (n,), generator=generator)


def captions(scenes: Sequence[Scene], generator: torch.Generator, wording: Wording = "full") -> list[str]:
    """One for each scene."""
    salts = torch.randint(2**31, (len(scenes),), generator=generator).tolist()
    if wording != "full":
        return [short_caption(scene, wording) for scene in scenes]
    return [caption(scene, salt) for scene, salt in zip(scenes, salts, strict=True)]


def as_pixels(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def at_a_time(device: str, on_a_card: int = 2048) -> int:
    """How many pictures to draw, encode or look at together: what fits a processor's cache, or fills a card."""
    return 64 if device == "cpu" else on_a_card
