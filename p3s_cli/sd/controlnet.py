"""ControlNets: pictures that say where things go. Their residuals enter the U-Net outside attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from p3s_cli.errors import InputError
from p3s_cli.sd import hub
from p3s_cli.sd.family import Family
from p3s_cli.sd.images import to_tensor

NAMES = {
    "canny": "lllyasviel/control_v11p_sd15_canny@115a470d547982438f70198e353a921996e2e819",
    "depth": "lllyasviel/control_v11f1p_sd15_depth@539f99181d33db39cf1af2e517cd8056785f0a87",
    "openpose": "lllyasviel/control_v11p_sd15_openpose@9ae9f970358db89e211b87c915f9535c6686d5ba",
    "softedge": "lllyasviel/control_v11p_sd15_softedge@b5bcad0c48e9b12f091968cf5eadbb89402d6bc9",
    "normal": "lllyasviel/control_v11p_sd15_normalbae@cb7296e6587a219068e9d65864e38729cd862aa8",
}


@dataclass(frozen=True)
class Guide:
    """One ControlNet, the picture it reads (1, 3, H, W) in [0, 1], and how strongly it speaks."""

    net: ControlNetModel
    picture: Tensor
    strength: float


def check_name(name: str) -> None:
    """Raises InputError for what is neither a known name nor reads like a folder or a hub id."""
    if name not in NAMES and not Path(name).is_dir() and not hub.is_id(name):
        raise InputError(f"no ControlNet is called {name!r}; use {', '.join(NAMES)}, a folder or a hub id")


def part(name: str) -> hub.Part:
    """The files of a ControlNet by name, folder or hub id. Raises InputError for what is none of these."""
    check_name(name)
    return hub.Part(name, NAMES.get(name, name), weights="diffusion_pytorch_model")


def load_guide(family: Family, name: str, picture: Image.Image, strength: float, size: tuple[int, int]) -> Guide:
    """A ControlNet by name, folder or hub id, with its picture resized to `size` (height, width) in pixels.

    Raises InputError if it cannot be had, or was made for another kind of base.
    """
    net = hub.load(ControlNetModel, part(name), fetch=f"p3s fetch {family.source} --control {name}")
    ours, theirs = family.unet.config, net.config
    for field in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        if getattr(ours, field) != getattr(theirs, field):
            raise InputError(
                f"the ControlNet {name} was made for another base ({field} {getattr(theirs, field)}, "
                f"here {getattr(ours, field)}); use one that was made for {family.source}"
            )
    net = net.to(family.device, family.dtype).eval().requires_grad_(False)
    resized = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return Guide(net, to_tensor(resized)[None].to(family.device, family.dtype), strength)


def residuals(guides: Sequence[Guide], x_t: Tensor, t: Tensor, text: Tensor) -> tuple[list[Tensor], Tensor]:
    """The sum of what the guides add to the U-Net's down blocks and to its middle block, for a batch."""
    total: tuple[list[Tensor], Tensor] | None = None
    for guide in guides:
        dtype = guide.net.dtype
        down, middle = guide.net(
            x_t.to(dtype),
            t,
            text.to(dtype),
            guide.picture.expand(len(x_t), -1, -1, -1),
            conditioning_scale=guide.strength,
            return_dict=False,
        )
        total = (
            ([a + b for a, b in zip(total[0], down, strict=True)], total[1] + middle) if total else (list(down), middle)
        )
    if total is None:
        raise ValueError("residuals of no guide")
    return total


def speaker(guides: Sequence[Guide]):
    """The guides as the sampler's `control`, or None where there are none."""
    if not guides:
        return None
    return lambda x_t, t, text: residuals(guides, x_t, t, text)
