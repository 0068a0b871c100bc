"""Square views of a reference: where the subject stands in what the copy sees and in what is denoised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class View:
    """A square window on a photo: centre and side in pixels, turned by `degrees`, perhaps mirrored."""

    x: float
    y: float
    side: float
    degrees: float = 0.0
    flip: bool = False


def base_view(mask: Tensor) -> View:
    """The largest square of the photo around the subject, or where none holds it the smallest that does, beyond the photo's long sides.

    mask (H, W) bool.
    """
    return _around(mask, min(mask.shape))


def close_view(mask: Tensor, margin: float = 0.1) -> View:
    """The square around the subject with a margin on each side, relative to the subject; never larger than `base_view`.

    mask (H, W) bool.
    """
    top, bottom, left, right = _box(mask)
    side = (1 + 2 * margin) * max(bottom - top, right - left)
    return _around(mask, min(side, *mask.shape))


def centred_view(mask: Tensor, margin: float) -> View:
    """The square with the subject in its very middle and a margin on each side, beyond the photo's edge if need be.

    A base draws a lone subject in the middle; where a control holds it aside, the base paints another beside it.
    mask (H, W) bool.
    """
    top, bottom, left, right = _box(mask)
    side = (1 + 2 * margin) * max(bottom - top, right - left)
    return View((left + right) / 2, (top + bottom) / 2, min(side, max(mask.shape)))


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of what is masked; of the whole photo if nothing is."""
    rows, columns = torch.where(mask if mask.any() else torch.ones_like(mask))
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def _around(mask: Tensor, side: float) -> View:
    """The square of this side, or as large as the subject, nearest to the subject's middle: inside the photo, or as far beyond
    one side of it as beyond the other."""
    top, bottom, left, right = _box(mask)
    side = max(side, bottom - top, right - left)

    def middle(low: int, high: int, edge: int) -> float:
        return min(max((low + high) / 2, side / 2), edge - side / 2) if side <= edge else edge / 2

    height, width = mask.shape
    return View(middle(left, right, width), middle(top, bottom, height), side)


def random_view(base: View, mask: Tensor, generator: torch.Generator) -> View:
    """A view in which the subject is elsewhere, larger or smaller, a little turned, perhaps mirrored.

    The subject's centre lands in the middle 68 % of the view: 60 % before the turn.
    """
    u = torch.rand(5, generator=generator).tolist()
    side = base.side * (0.75 + 0.65 * u[0])
    rows, columns = torch.where(mask)
    x, y = (columns.float().mean().item(), rows.float().mean().item()) if len(rows) else (base.x, base.y)
    return View(x + side * 0.6 * (u[1] - 0.5), y + side * 0.6 * (u[2] - 0.5), side, 16 * (u[3] - 0.5), u[4] < 0.5)


def look_mask(mask: Tensor, view: View, size: int | tuple[int, int]) -> Tensor:
    """A mask (H, W) through the view, (1, size, size) in [0, 1]; beyond the photo's edge there is nothing."""
    return look(mask.float()[None], view, size, beyond="zeros")


def look(image: Tensor, view: View, size: int | tuple[int, int], beyond: str = "reflection") -> Tensor:
    """Resample (C, H, W) through the view to (C, size, size); beyond the photo's edge it is mirrored, or `zeros`, or
    its `border` goes on.

    A `size` (height, width) that is no square shows the view's square and more along its longer side.
    """
    height, width = image.shape[-2:]
    rows, columns = (size, size) if isinstance(size, int) else size
    shrink = min(1.0, min(rows, columns) / view.side)
    if shrink < 1:  # resample from a reduced photo, so that fine detail does not alias
        small = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        image = F.interpolate(image[None], size=small, mode="bilinear", antialias=True, align_corners=False)[0]
    mirror = -1.0 if view.flip else 1.0
    cos, sin = math.cos(math.radians(view.degrees)), math.sin(math.radians(view.degrees))
    across, down = (view.side / 2 * s / min(rows, columns) for s in (columns, rows))
    theta = torch.tensor(
        [
            [2 * cos * across * mirror / width, -2 * sin * down / width, 2 * view.x / width - 1],
            [2 * sin * across * mirror / height, 2 * cos * down / height, 2 * view.y / height - 1],
        ]
    )
    grid = F.affine_grid(theta[None], (1, 1, rows, columns), align_corners=False)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode=beyond, align_corners=False)[0]
