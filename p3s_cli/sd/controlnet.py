"""ControlNets: pictures that say where things go. Their residuals enter the U-Net outside attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ControlNetModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
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
    """One ControlNet, the pictures it reads, (1, 3, H, W) or one for each image, in [0, 1], and how strongly it speaks.

    `span` is the part of the steps, from 0 to 1, in which it speaks.
    """

    net: ControlNetModel
    picture: Tensor
    strength: float
    span: tuple[float, float] = (0.0, 1.0)

    def speaks(self, step: int, steps: int) -> bool:
        """Whether this step lies in the span as a whole, which is diffusers' rule."""
        return self.span[0] <= step / steps and (step + 1) / steps <= self.span[1]


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
    net = load_net(family, name)
    resized = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return Guide(net, to_tensor(resized)[None].to(family.device, family.dtype), strength)


def load_net(family: Family, name: str) -> ControlNetModel:
    """A ControlNet by name, folder or hub id. Raises InputError if it cannot be had, or fits another kind of base."""
    net = checked(family, hub.load(ControlNetModel, part(name), family.fetching("--control", name)), name)
    return net.to(family.device, family.dtype).eval().requires_grad_(False)


def load_saved(family: Family, folder: Path) -> list[ControlNetModel]:
    """The ControlNets of a folder of diffusers, if its index has any: `controlnet`, `controlnet_1` and so on, as many as there are."""
    if not hub.lists(str(folder), "controlnet"):
        return []
    names = itertools.chain(["controlnet"], (f"controlnet_{i}" for i in itertools.count(1)))
    found = itertools.takewhile(Path.is_dir, (folder / name for name in names))
    return [load_net(family, str(one)) for one in found]


def gathered(family: Family, given: Any) -> list[ControlNetModel]:
    """ControlNets as a pipeline is given them: one or several, modules or names, or a saved pipeline's folder (Path)."""
    if isinstance(given, Path):
        return load_saved(family, given)
    asked = list(given) if isinstance(given, (list, tuple)) else listed(given)
    return [load_net(family, one) if isinstance(one, str) else checked(family, one) for one in asked]


def listed(net: Any) -> list[Any]:
    """The nets of a pipeline's component, which several share: none, one, or those of a MultiControlNetModel."""
    return list(net.nets) if isinstance(net, MultiControlNetModel) else [] if net is None else [net]


def brought(net: Any) -> None:
    """Several nets that enable_model_cpu_offload keeps off the device, on it: their hook is the wrapper's, which is never called."""
    hook = getattr(net, "_hf_hook", None) if isinstance(net, MultiControlNetModel) else None
    if hook is not None:
        hook.pre_forward(net)


def checked(family: Family, net: ControlNetModel, name: str = "that was given") -> ControlNetModel:
    """The net as it is, for it may be somebody else's. Raises InputError if it was made for another kind of base."""
    ours, theirs = family.unet.config, net.config
    for field in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        if getattr(ours, field) != getattr(theirs, field):
            raise InputError(
                f"the ControlNet {name} was made for another base ({field} {getattr(theirs, field)}, "
                f"here {getattr(ours, field)}); use one that was made for {family.source}"
            )
    return net


def guides_of(
    nets: Sequence[ControlNetModel],
    image: Any,
    scale: float | Sequence[float],
    start: float | Sequence[float],
    end: float | Sequence[float],
    size: tuple[int, int],
    prompts: int,
    each: int,
) -> list[Guide]:
    """The guides that StableDiffusionControlNetPipeline's arguments speak of, `each` images a prompt.

    `image` is a picture (PIL, array or tensor in [0, 1]) or one for each prompt; with several nets, a list of such,
    one for each net. The numbers are one, or one for each net. Raises InputError where counts disagree.
    """
    if nets and image is None:
        raise InputError("a pipeline with a ControlNet needs the picture it reads; give image=...")
    if not nets:
        if image is not None:
            raise InputError("image= is for a ControlNet; name one in from_pretrained(..., controlnet=...)")
        return []
    pictures = [image] if len(nets) == 1 else list(image)
    numbers = [[n] * len(nets) if isinstance(n, (int, float)) else list(n) for n in (scale, start, end)]
    if any(len(given) != len(nets) for given in (pictures, *numbers)):
        raise InputError(f"there are {len(nets)} ControlNets; give each its picture, and one number or one for each")
    read = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    found = []
    for net, picture, strength, *span in zip(nets, pictures, *numbers, strict=True):
        tensor = read.preprocess(picture, *size).float()
        if len(tensor) not in (1, prompts):
            raise InputError(
                f"a ControlNet was given {len(tensor)} pictures for {prompts} prompts; give one, or as many"
            )
        found.append(Guide(net, tensor.repeat_interleave(each if len(tensor) > 1 else 1, 0), strength, tuple(span)))
    return found


def residuals(guides: Sequence[Guide], x_t: Tensor, t: Tensor, text: Tensor) -> tuple[list[Tensor], Tensor]:
    """The sum of what the guides add to the U-Net's down blocks and to its middle block, for a batch."""
    total: tuple[list[Tensor], Tensor] | None = None
    for guide in guides:
        dtype = guide.net.dtype
        down, middle = guide.net(
            x_t.to(dtype),
            t,
            text.to(dtype),
            guide.picture.to(x_t.device, dtype).repeat(len(x_t) // len(guide.picture), 1, 1, 1),
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
