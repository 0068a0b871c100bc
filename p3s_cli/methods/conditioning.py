"""What P3S's copy is shown of a subject's references, and what its training draws from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import ControlConfig
from p3s_cli.methods.photos import Photo
from p3s_cli.methods.views import View, base_view, centred_view, close_view, look_mask, random_view
from p3s_cli.sd import images
from p3s_cli.sd.family import Family
from p3s_cli.sd.train import sent

_MARGIN = 0.35  # of the subject's size, on each side of it in a close view
_VIEWS = 24  # augmented views encoded once for each reference


@dataclass(frozen=True)
class Condition:
    """What the copy is given of a reference: latent I' (B, 4, h, w) and vision states c_s (B, M, D)."""

    latent: Tensor
    vision: Tensor

    def __getitem__(self, index: Tensor | slice) -> Condition:
        return Condition(self.latent[index], self.vision[index])


def condition(
    family: Family,
    photos: list[Photo],
    views: list[View],
    config: ControlConfig,
    size: tuple[int, int] | None = None,
) -> Condition:
    """Encode what the copy sees of each photo through its view, its background removed if so configured.

    The latents have `size` (height, width in pixels; default the family's square), as the image to be
    drawn has; the vision tower always sees the square.
    """
    square = (family.profile.image_size,) * 2
    seen = _seen(photos, views, config, square)
    vision = torch.cat([family.vision.tokens(b) for b in seen.split(8)])
    drawn = seen if size in (None, square) else _seen(photos, views, config, size)
    return Condition(images.encode(family.vae, drawn), vision)


def _seen(photos: list[Photo], views: list[View], config: ControlConfig, size: tuple[int, int]) -> Tensor:
    seen = []
    for photo, view in zip(photos, views, strict=True):
        picture = photo.seen(view, size)
        if config.reference_background == "remove":
            keep = look_mask(photo.mask, view, size)
            picture = picture * keep + 0.5 * (1 - keep)
        seen.append(picture)
    return torch.stack(seen)


@dataclass(frozen=True)
class ReferenceBank:
    """Everything a training step draws from, encoded once: targets (K, 4, h, w), their masks (K, 1, h, w), conditions."""

    targets: Tensor
    masks: Tensor
    conditions: Condition

    @classmethod
    def build(cls, family: Family, photos: list[Photo], config: ControlConfig, seed: int) -> ReferenceBank:
        generator = torch.Generator().manual_seed(seed)
        size = family.profile.image_size
        repeats = 1 if config.augment == "none" else _VIEWS
        chosen = [p for p in photos for _ in range(repeats)]
        target_views = [_view(p, config, generator) for p in chosen]
        seen_views = target_views if config.augment != "independent" else [_view(p, config, generator) for p in chosen]
        targets = torch.stack([p.seen(v, size) for p, v in zip(chosen, target_views, strict=True)])
        masks = torch.stack([look_mask(p.mask, v, size) for p, v in zip(chosen, target_views, strict=True)])
        latents = images.encode(family.vae, targets)
        inside = F.interpolate(masks, size=latents.shape[-2:], mode="area").to(latents.device)
        return cls(latents, inside, condition(family, chosen, seen_views, config))

    def draw(self, batch: int, config: ControlConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Condition]:
        """A batch of targets, masks and conditions; jointly or independently drawn."""
        target = seen = self._some(batch, generator)
        if config.augment == "independent":
            seen = self._some(batch, generator)
        return self.targets[target], self.masks[target], self.conditions[seen]

    def _some(self, batch: int, generator: torch.Generator) -> Tensor:
        return sent(torch.randint(len(self.targets), (batch,), generator=generator), self.targets.device)


def reference_view(mask: Tensor, config: ControlConfig) -> View:
    """The part of a photo that stands for the subject, in training and in sampling."""
    if config.reference_view == "photo":
        return base_view(mask)
    return (close_view if config.reference_view == "close" else centred_view)(mask, _MARGIN)


def _view(photo: Photo, config: ControlConfig, generator: torch.Generator) -> View:
    base = reference_view(photo.mask, config)
    return base if config.augment == "none" else random_view(base, photo.mask, generator)
