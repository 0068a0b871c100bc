"""Where the subject is in a picture that nobody clicked on: our own masks, started at the most alike patch."""

from __future__ import annotations

import hashlib

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import MaskConfig
from p3s_cli.sd import images
from p3s_cli.sd.vision import VisionTower
from p3s_cli.segment.select import select

_HOW = MaskConfig()
_KEPT = 256  # masks


class Finder:
    """Knows one subject by its patches in a reference: photo (3, H, W) in [0, 1], mask (H, W) bool."""

    def __init__(self, tower: VisionTower, photo: Tensor, mask: Tensor):
        self._tower, self._found = tower, {}
        shown = (photo * 255).round().to(torch.uint8), mask.to(torch.uint8)
        seen = b"".join(part.contiguous().numpy().tobytes() for part in shown)
        self.digest = hashlib.sha256(seen + f"{tower.fingerprint}{_HOW}".encode()).hexdigest()[:12]
        features = tower.patches(photo)
        inside = F.interpolate(mask[None, None].float(), size=features.shape[:2], mode="area")[0, 0] > 0.5
        inside = inside if inside.any() else torch.ones_like(inside)
        unit = F.normalize(features, dim=-1)
        own, rest = unit[inside].mean(0), unit[~inside].mean(0) if (~inside).any() else torch.zeros(unit.shape[-1])
        self._direction = F.normalize(own - rest, dim=0)  # what tells the subject from what surrounded it

    def mask(self, picture: Image.Image) -> Tensor:
        """(H, W) bool. Several columns ask for the same picture's, so the latest are kept."""
        key = picture.size, hashlib.sha256(picture.tobytes()).digest()
        if key not in self._found:
            self._found[key] = self._find(images.to_tensor(picture))
            if len(self._found) > _KEPT:
                del self._found[next(iter(self._found))]
        return self._found[key]

    def _find(self, pixels: Tensor) -> Tensor:
        features = self._tower.patches(pixels)
        alike = F.normalize(features, dim=-1) @ self._direction
        smooth = F.avg_pool2d(alike[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        row, column = divmod(int(smooth.argmax()), smooth.shape[1])
        click = ((column + 0.5) / smooth.shape[1], (row + 0.5) / smooth.shape[0])
        return select(pixels, features, [click], [], _HOW).subject

    def blackened(self, picture: Image.Image) -> Image.Image:
        """The picture with everything but the subject black."""
        return images.to_pil(images.to_tensor(picture) * self.mask(picture))

    def place(self, picture: Image.Image) -> tuple[float, float]:
        """Centre of the subject as fractions (x, y) of the picture."""
        mask = self.mask(picture)
        rows, columns = torch.where(mask)
        return columns.float().mean().item() / mask.shape[1], rows.float().mean().item() / mask.shape[0]
