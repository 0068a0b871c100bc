"""The family's inpainting model as a plain function: image, region, seed -> filled image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.sd.family import Family
from p3s_cli.sd.images import to_pil, to_tensor


def inpainting_filler(family: Family, steps: int = 25) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """A filler over diffusers' inpainting pipeline, or None where the family has no inpainter at hand.

    The filler takes an image (3, H, W) in [0, 1], a region to repaint (H, W) bool and a seed; it works
    at the family's own size and pastes back only the region.
    """
    unet = family.inpaint_unet
    if unet is None:
        return None
    # only now: a family that fills in without a model finds masks in less time than this import takes
    from diffusers import StableDiffusionInpaintPipeline

    from p3s_cli.sd.pipeline import pipeline
    from p3s_cli.sd.standins import Autoencoder

    pipe = pipeline(StableDiffusionInpaintPipeline, family, unet=unet)
    pipe.__dict__["vae"] = Autoencoder(family.vae)

    def fill(image: Tensor, region: Tensor, seed: int) -> Tensor:
        height, width = image.shape[-2:]
        scale = family.profile.image_size / max(height, width)
        size = tuple(max(64, round(s * scale / 8) * 8) for s in (height, width))
        small = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(region.float()[None, None], size=size)[0, 0]
        filled = pipe(
            prompt="",
            image=to_pil(small),
            mask_image=to_pil(mask.expand(3, -1, -1)).convert("L"),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        full = F.interpolate(to_tensor(filled)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        return torch.where(region, full, image)

    return fill
