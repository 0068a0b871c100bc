"""Metric models: PIL images in, unit vectors out, with the preprocessing and fingerprint a score is quoted with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, CLIPModel, CLIPTokenizer

from p3s_cli.errors import InputError
from p3s_cli.sd import hub

_BATCH = 32


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` (bicubic, antialiased), centre crop, then (x - mean) / std. Sizes in pixels."""

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __str__(self) -> str:
        numbers = ", ".join(f"{m:g}/{s:g}" for m, s in zip(self.mean, self.std, strict=True))
        return f"resize {self.resize} bicubic, crop {self.crop}, {numbers}"

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size -> (B, 3, crop, crop)."""
        pixels = np.stack([np.asarray(self._square(image)) for image in images])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def _square(self, image: Image.Image) -> Image.Image:
        scale = self.resize / min(image.size)
        width, height = (max(self.crop, round(side * scale)) for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        return resized.crop((left, top, left + self.crop, top + self.crop))


class MetricModel:
    """One model of a protocol, loaded at its first use from a folder or the hub; only safetensors.

    What its vector is follows from its kind: the projected embedding of a CLIP, the CLS token of a ViT or
    DINOv2, the pooled output of a ResNet.
    """

    def __init__(self, where: str, preprocessing: Preprocessing, device: str = "cpu", command: str = "p3s fetch"):
        """`command` is what brings the model, for whom it is missing."""
        self.where, self.preprocessing, self.device, self.command = where, preprocessing, device, command

    def load(self) -> None:
        """Load what is otherwise loaded at first use. Raises InputError if it is not at hand."""
        if isinstance(self._model, CLIPModel):
            _ = self._tokenizer

    @cached_property
    def name(self) -> str:
        path = Path(self.where)
        return f"{path.parent.name}/{path.name}" if path.is_dir() else self.where

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self._model)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (B, D)."""
        parts = [
            self._vector(self.preprocessing(images[i : i + _BATCH]).to(self.device))
            for i in range(0, len(images), _BATCH)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D). Only a CLIP has them."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return F.normalize(_tensor(self._model.get_text_features(**tokens)).float(), dim=-1).cpu()

    def _vector(self, pixels: Tensor) -> Tensor:
        if isinstance(self._model, CLIPModel):
            return _tensor(self._model.get_image_features(pixel_values=pixels))
        out = self._model(pixel_values=pixels)
        if self._model.config.model_type == "resnet":
            return out.pooler_output.flatten(1)
        return out.last_hidden_state[:, 0]

    @cached_property
    def _model(self):
        kind = CLIPModel if _load(AutoConfig, self.where, self.command).model_type == "clip" else AutoModel
        return _load_model(kind, self.where, self.device, self.command)

    @cached_property
    def _tokenizer(self) -> CLIPTokenizer:
        folder = Path(self.where)
        beside = folder.parent / "tokenizer"  # a family keeps one tokenizer for both its text towers
        own = not folder.is_dir() or (folder / "tokenizer.json").exists() or not beside.is_dir()
        tokenizer = _load(CLIPTokenizer, self.where if own else str(beside), self.command)
        if tokenizer.vocab_size <= 2:  # its two marks: what transformers makes, in silence, where the files are missing
            raise InputError(f"the metric model {self.where} has no vocabulary here; run `{self.command}` again")
        return tokenizer


class LabelReader:
    """A classifier whose labels are `group/value`: for each group, what it reads off an image."""

    def __init__(self, where: str, preprocessing: Preprocessing, device: str = "cpu"):
        self.where, self.preprocessing, self.device = where, preprocessing, device
        self._model = _load_model(AutoModelForImageClassification, where, device)

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self._model)

    @torch.no_grad()
    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, labels)."""
        parts = [
            self._model(pixel_values=self.preprocessing(images[i : i + _BATCH]).to(self.device)).logits
            for i in range(0, len(images), _BATCH)
        ]
        return torch.cat(parts).float().cpu()

    def read(self, images: Sequence[Image.Image], group: str, top: int = 1) -> list[list[str]]:
        """The `top` likeliest labels of a group for each image."""
        labels = [self._model.config.id2label[i] for i in range(self._model.config.num_labels)]
        columns = [i for i, label in enumerate(labels) if label.startswith(f"{group}/")]
        best = self.logits(images)[:, columns].topk(top, dim=1).indices
        return [[labels[columns[i]] for i in row] for row in best.tolist()]


def _fingerprint(model: torch.nn.Module) -> str:
    """The first 16 hex digits of the sha256 over all weights and their names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if "pooler." in key:  # a ViT's own; unread here, and random where a checkpoint has none
            continue
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensor(features) -> Tensor:
    return getattr(features, "pooler_output", features)  # transformers 5 wraps the vector, 4 does not


def _load_model(kind, where: str, device: str, command: str = "p3s fetch"):
    """Frozen, in float32. Raises InputError if its files lack weights that a score would depend on."""
    model, info = _load(kind, where, command, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if "pooler." not in key]
    if missing:
        raise InputError(f"the metric model {where} has no weights for {missing[0]}; it is not a model of this kind")
    return model.to(device).eval().requires_grad_(False)


def _load(kind, where: str, command: str, **options):
    """From a folder, or `owner/name[@revision]` in the hub's cache or on the hub."""
    otherwise = "or choose another --protocol"
    return hub.from_pretrained(
        kind, where, remedy=f"restore it, {otherwise}", fetch=command, otherwise=otherwise, **options
    )
