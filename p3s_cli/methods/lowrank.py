"""A trained control as a low-rank difference to what it started from.

    W = W_0 + U V,   U (m, r), V (r, n): the r largest singular directions of W - W_0

W_0 is the frozen layer a weight of the copy was initialised from, and zero for the zero convolutions.
Convolutions are matrices (out, in * k * k). Vectors, and matrices that r(m + n) numbers would not make
smaller, keep their difference whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from p3s_cli.paper.subject_copy import frozen_name

_COPY = "copy."
_OVERSAMPLE, _ITERATIONS = 8, 4  # of the randomised SVD
RANK = 48  # 73 MB at SD v1-5's shape


def split(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel, rank: int = RANK) -> dict[str, Tensor]:
    """The difference to the base: `<name>` for what stays whole, `<name>.u` and `<name>.v` for what does not, fp16."""
    parts = {}
    for name, tensor in tensors.items():
        difference = tensor.float() - _start(name, tensor, unet)
        if worthwhile(tensor.shape, rank):
            u, v = factors(difference.flatten(1), rank)
            parts |= {f"{name}.u": u.half(), f"{name}.v": v.half()}
        else:
            parts[name] = difference.half()
    return parts


def join(
    parts: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], unet: UNet2DConditionModel
) -> dict[str, Tensor]:
    """The control's tensors again, fp16. `shapes`: of each of them by name."""
    tensors = {}
    for name, shape in shapes.items():
        if f"{name}.u" in parts:
            difference = (parts[f"{name}.u"].float() @ parts[f"{name}.v"].float()).view(shape)
        else:
            difference = parts[name].float().view(shape)
        tensors[name] = (_start(name, difference, unet) + difference).half()
    return tensors


def _start(name: str, like: Tensor, unet: UNet2DConditionModel) -> Tensor:
    """What training began with: the frozen layer's weight for the copy, nothing for the rest."""
    if not name.startswith(_COPY):
        return torch.zeros_like(like, dtype=torch.float32)
    return (
        unet.get_parameter(frozen_name(name.removeprefix(_COPY), unet.config.layers_per_block)).float().to(like.device)
    )


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) with the singular values' roots in each; the same on every call."""
    if min(matrix.shape) <= 4 * rank:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T


def worthwhile(shape: torch.Size, rank: int) -> bool:
    """Whether two factors hold fewer numbers than the matrix."""
    rows, columns = shape[0] if len(shape) else 1, shape[1:].numel()
    return len(shape) > 1 and rank * (rows + columns) < rows * columns


def size(shapes: Mapping[str, torch.Size], rank: int | None) -> int:
    """Bytes of a control's tensors in fp16; with a rank, of its low-rank difference."""

    def numbers(shape: torch.Size) -> int:
        if rank is None or not worthwhile(shape, rank):
            return shape.numel()
        return rank * (shape[0] + shape[1:].numel())

    return 2 * sum(numbers(shape) for shape in shapes.values())
