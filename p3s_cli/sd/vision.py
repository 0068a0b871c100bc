"""The CLIP pair as p3s uses it: patch features of any image size, tokens for attention, vectors for scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer


class VisionTower:
    """A CLIP model and its pixel statistics. Images are (B, 3, H, W) in [0, 1], of any size, never cropped."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, mean: Sequence[float], std: Sequence[float]):
        self.clip, self.tokenizer = clip, tokenizer
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)
        config = clip.config.vision_config
        self.logit_scale = clip.logit_scale.exp().item()
        self.native, self.patch, self.width = config.image_size, config.patch_size, config.hidden_size

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vision tower's weights as they are in memory, in half precision."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.clip.vision_model.state_dict().items()):
            digest.update(name.encode() + tensor.half().cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def patches(self, image: Tensor, layers: Sequence[int] = (-1,), side: int | None = None) -> Tensor:
        """Patch tokens (H_p, W_p, D) of one image (3, H, W), the class token left out.

        The whole image is resized, aspect kept, to about the area of `side` x `side` pixels (the
        tower's own by default; then the grid is square, as the tower was trained) and its position
        embedding interpolated. `layers` index the hidden states, -1 the last, which for CLIP carries no
        final LayerNorm; of several, the mean of the unit vectors is taken.
        """
        rows, columns = self._grid(image.shape[-2], image.shape[-1], side)
        hidden = self._forward(image[None], (rows, columns)).hidden_states
        chosen = [hidden[i][0, 1:].float() for i in layers]
        mean = chosen[0] if len(chosen) == 1 else torch.stack([F.normalize(h, dim=-1) for h in chosen]).mean(0)
        return mean.reshape(rows, columns, -1).cpu()

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """c_s: the last hidden state with its class token, (B, 1 + N, D), at the tower's own resolution."""
        side = self.native // self.patch
        return self._forward(images, (side, side)).last_hidden_state

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, P) in the space shared with `embed_text`."""
        side = self.native // self.patch
        pooled = self._forward(images, (side, side)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, P)."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        pooled = self.clip.text_model(**tokens).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1).cpu()

    def _grid(self, height: int, width: int, side: int | None) -> tuple[int, int]:
        if side is None:
            return self.native // self.patch, self.native // self.patch
        cells = side / self.patch
        aspect = (height / width) ** 0.5
        return max(2, round(cells * aspect)), max(2, round(cells / aspect))

    def _forward(self, images: Tensor, grid: tuple[int, int]):
        size = (grid[0] * self.patch, grid[1] * self.patch)
        pixels = F.interpolate(
            images.float().cpu(), size=size, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        pixels = ((pixels - self._mean) / self._std).to(self.clip.device, self.clip.dtype)
        return self.clip.vision_model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
