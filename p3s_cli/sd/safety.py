"""diffusers' safety checker on finished images, as its pipelines apply it: what it flags becomes black."""

from __future__ import annotations

import torch
from torch import Tensor

from p3s_cli.errors import InputError
from p3s_cli.sd.family import Family
from p3s_cli.sd.images import to_pil


def ready(family: Family) -> None:
    """Load the checker if the base has one. Raises InputError, with the way out, if it is not at hand."""
    try:
        _ = family.safety_checker
    except InputError as error:
        raise InputError(f"{error}; or leave the safety checker out with --no-safety-checker") from error


@torch.no_grad()
def check(family: Family, images: Tensor) -> tuple[Tensor, list[str]]:
    """Images (B, 3, H, W) in [0, 1] -> the same with flagged ones black, and `passed` or `flagged` for each.

    `no checker` for each where the base brings none.
    """
    if family.safety_checker is None:
        return images, ["no checker"] * len(images)
    checker, processor = family.safety_checker
    pixels = processor([to_pil(i) for i in images], return_tensors="pt").pixel_values
    checked, flagged = checker(clip_input=pixels.to(family.device, family.dtype), images=images.clone())
    return checked, ["flagged" if f else "passed" for f in flagged]
