"""An exported subject's file: the description beside its tensors, which tensors there are, and pictures packed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from p3s_cli.errors import InputError, first_reason
from p3s_cli.manifest import Reference
from p3s_cli.methods import lowrank
from p3s_cli.sd import images, text
from p3s_cli.sd.weights import Layout, load_metadata, load_tensors
from p3s_cli.subject import FORMER_LATENT, mask_layout

FORMAT = 2  # factors in eight bits; 1, in sixteen, is read too


class Kept(Reference):
    """A reference as it is exported: the settings of its mask stand where the stage was."""

    mask: dict[str, Any]  # type: ignore[assignment]


class Exported(BaseModel):
    """The description in an exported file."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    format: int
    rank: int | None = Field(gt=0)
    base_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # older files do not say
    class_word: str = Field(min_length=1)
    identifier: str = Field(min_length=1)
    model: str
    finetune: dict[str, Any]
    seed: int
    result: dict[str, Any]
    references: list[Kept] = Field(min_length=1)


def read_description(file: Path) -> Exported:
    """Raises InputError if the file holds no description that p3s export wrote."""
    metadata = load_metadata(file)
    try:
        if metadata.get("format") not in range(1, FORMAT + 1):
            raise ValueError(
                f"its format is {metadata.get('format')!r:.20}, and this version of p3s reads up to {FORMAT}"
            )
        described = Exported.model_validate(metadata)
        _check_words(described)
        if not all(isinstance(described.finetune.get(name), str) for name in ("base", "base_fingerprint")):
            raise ValueError("it names no base")
        if not isinstance(described.finetune.get("vision", ""), str):
            raise ValueError("it names no CLIP pair")
        return described
    except ValueError as error:
        raise InputError(
            f"{file} is not a subject that p3s export wrote ({first_reason(error)}); give such a file"
        ) from error


def _check_words(described: Exported) -> None:
    """Raises ValueError for words that no subject of one's own could have: they go into prompts, and into commands to paste."""
    for which, word in (("class word", described.class_word), ("identifier", described.identifier)):
        try:
            text.class_word(word)
        except InputError as error:
            raise ValueError(f"its {which} is none: {word!r:.40}") from error


def read_tensors(file: Path, described: Exported, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The control, of these shapes, and each reference's tensors, pixels packed. Raises InputError if the file holds others."""
    former = {f"reference/{i}/latent": FORMER_LATENT for i in range(len(described.references))}
    return load_tensors(file, _layout(described, shapes), perhaps=former)[0]


def _layout(described: Exported, shapes: dict[str, torch.Size]) -> Layout:
    """What the file must hold: the control of these shapes, and each reference's tensors, pixels packed."""
    wanted: dict[str, tuple[str, tuple[int | None, ...]]] = dict(
        lowrank.layout(shapes, described.rank, described.format > 1)
    )
    for i, kept in enumerate(described.references):
        for name, (dtype, shape) in mask_layout(kept).items():
            wanted[f"reference/{i}/{name}"] = (dtype, (None,) if dtype == "U8" else shape)
    return wanted


def packed(pixels: Tensor) -> Tensor:
    """uint8 (3, H, W) or (H, W) as the bytes of a PNG, which loses nothing and is a fraction as large."""
    buffer = io.BytesIO()
    array = pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels
    Image.fromarray(array.contiguous().numpy()).save(buffer, format="PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpacked(data: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """`packed` undone. Raises ValueError, before anything is unpacked, for a picture of another shape."""
    with Image.open(io.BytesIO(data.numpy().tobytes()), formats=("PNG",)) as image:
        size, mode = (shape[-1], shape[-2]), "RGB" if len(shape) == 3 else "L"
        if image.size != size or image.mode != mode or image.width * image.height > images.MAX_PIXELS:
            raise ValueError(f"it is {image.mode} of {image.width} x {image.height} pixels")
        array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array
