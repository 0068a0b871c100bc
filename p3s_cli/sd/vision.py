"""Vision towers as p3s uses them: patch features of any image size, and the CLIP pair with its text side."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

# Where masks are read from an unknown tower: the third quarter of its layers, about 39 x 39 patches
# (768 x 512 pixels at patch 16). What a family's own tower wants is in its profile.
_DEPTHS = (7 / 12, 8 / 12, 9 / 12)
_CELLS = 39


class VisionTower:
    """A ViT of transformers and its pixel statistics. Images are (B, 3, H, W) in [0, 1], never cropped.

    `layers` and `side` are what its patch features for masks are read at: hidden states, and pixels of a
    square photo. `as_filed` reads the model once more, in the precision of its files.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        layers: Sequence[int] | None = None,
        side: int | None = None,
        as_filed: Callable[[], nn.Module] | None = None,
    ):
        self.model, self._as_filed = model, as_filed
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)
        config = model.config
        self.native, self.patch, self.width = config.image_size, config.patch_size, config.hidden_size
        self.layers = tuple(layers or (round(d * config.num_hidden_layers) for d in _DEPTHS))
        self.side = side or _CELLS * self.patch
        # DINOv2 always interpolates its positions and has no such switch
        asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"interpolate_pos_encoding": True} if asks else {}

    @property
    def statistics(self) -> dict[str, list[float]]:
        """Pixel mean and deviation, as a preprocessor_config.json has them."""
        return {"image_mean": self._mean.flatten().tolist(), "image_std": self._std.flatten().tolist()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tower's weights in half precision, its layers and its resolution.

        The same whatever precision it is loaded in: bfloat16 has lost what half precision keeps, so there its files are asked.
        Without the pooler, which no patch depends on: a ViT's file may have none, and it is then drawn at random.
        """
        lost = self.model.dtype == torch.bfloat16 and self._as_filed is not None
        model = self._as_filed() if lost else self.model
        digest = hashlib.sha256(repr((self.layers, self.side)).encode())
        for name, tensor in sorted(model.state_dict().items()):
            if name.startswith("pooler."):
                continue
            digest.update(name.encode() + tensor.half().cpu().numpy().tobytes())
        return digest.hexdigest()

    def patches(self, image: Tensor) -> Tensor:
        """What masks are made from: the mean of the unit vectors of `layers`, (H_p, W_p, D).

        The whole image (3, H, W) is resized, aspect kept, to about the area of `side` x `side` pixels,
        and the position embedding interpolated.
        """
        cells, aspect = self.side / self.patch, (image.shape[-2] / image.shape[-1]) ** 0.5
        return self._patches(image, self.layers, (max(2, round(cells * aspect)), max(2, round(cells / aspect))))

    def native_patches(self, image: Tensor) -> Tensor:
        """P3S eq. 1 as printed: last hidden state at the tower's own square grid, (N, N, D), still uncropped.

        CLIP's carries no final LayerNorm.
        """
        return self._patches(image, (-1,), self._grid)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """c_s: the last hidden state with its class token, (B, 1 + N, D), at the tower's own resolution."""
        return self._forward(images, self._grid).last_hidden_state

    @property
    def _grid(self) -> tuple[int, int]:
        return self.native // self.patch, self.native // self.patch

    @torch.no_grad()
    def _patches(self, image: Tensor, layers: Sequence[int], grid: tuple[int, int]) -> Tensor:
        hidden = self._forward(image[None], grid).hidden_states
        count = grid[0] * grid[1]  # class and register tokens come first
        chosen = [hidden[i][0, -count:].float() for i in layers]
        mean = chosen[0] if len(chosen) == 1 else torch.stack([F.normalize(h, dim=-1) for h in chosen]).mean(0)
        return mean.reshape(*grid, -1).cpu()

    def _forward(self, images: Tensor, grid: tuple[int, int]) -> Any:
        size = (grid[0] * self.patch, grid[1] * self.patch)
        resized = F.interpolate(images.float().cpu(), size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels = ((resized.clamp(0, 1) - self._mean) / self._std).to(self.model.device, self.model.dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True, **self._options)


class ClipPair(VisionTower):
    """A CLIP model: its vision tower, and the space it shares with its text tower."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, mean, std, layers=None, side=None, as_filed=None):
        super().__init__(clip.vision_model, mean, std, layers, side, as_filed)
        self.clip, self.tokenizer = clip, tokenizer
        self.logit_scale = clip.logit_scale.exp().item()

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, P) of images."""
        pooled = self._forward(images, self._grid).pooler_output
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, P) of texts."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        pooled = self.clip.text_model(**tokens).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1).cpu()
