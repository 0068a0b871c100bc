"""Files <-> pixels <-> latents.

Pixels are float tensors (3, H, W) in [0, 1]; latents (4, H/8, W/8), scaled as the U-Net wants them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from p3s_cli.atomic import replacing
from p3s_cli.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MIN_SIDE = 16


def load_image(path: Path, managed: bool = True) -> Image.Image:
    """Read a photo as its taker sees it: EXIF-upright, RGB, transparency over white, 16 bit scaled to 8.

    Pictures with a colour profile are brought to sRGB, if `managed`. Raises InputError naming the file if it is absent, no JPEG, PNG or WebP, broken, tiny or huge.
    """
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if not path.is_file():
            raise InputError(f"{path} is not a file; give a JPEG, PNG or WebP image")
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JPEG, PNG or WebP image") from error
    with _opened(path, FORMATS) as image:
        if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
            raise InputError(f"{path} is animated; give one frame of it")
        image.load()
        eight = _eight_bits(image)
        upright = _rgb(ImageOps.exif_transpose(_managed(eight) if managed else eight))
        upright.info = {}  # nothing but pixels leaves here: no EXIF, GPS, XMP or comment
    if min(upright.size) < MIN_SIDE:
        raise InputError(
            f"{path} has {upright.width} x {upright.height} pixels; a reference needs at least {MIN_SIDE} on each side"
        )
    return upright


@contextlib.contextmanager
def _opened(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image file of one of the formats, not too large to be unpacked. InputError for all that goes wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(
                        f"{path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 1_000_000} million; make it smaller"
                    )
                yield image
    except InputError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a JPEG, PNG or WebP image that can be read") from error
    except Exception as error:  # whatever a parser runs into in a file that anyone may have made
        raise InputError(f"{path} cannot be read as an image ({error})") from error


def _managed(image: Image.Image) -> Image.Image:
    """In sRGB what an embedded profile says of the colours (Display P3, Adobe RGB, a printer's CMYK); as it is without one."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    grey = image.mode in ("1", "L", "LA")
    colours = image if image.mode == "CMYK" else image.convert("L" if grey else "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        seen = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one of another kind of picture
        return image
    if _see_through(image):
        seen.putalpha(image.convert("RGBA").getchannel("A"))
    seen.info = {k: v for k, v in image.info.items() if k != "transparency"}  # which way up it is
    return seen


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    eight = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    eight.info = {k: v for k, v in image.info.items() if k != "transparency"}  # one of 65,536 greys: never a photo's
    return eight


def _see_through(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _rgb(image: Image.Image) -> Image.Image:
    if _see_through(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def pixel_hash(image: Image.Image) -> str:
    """sha256 of what is seen: the size and the RGB bytes, whatever file they came from."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def to_bytes(image: Image.Image) -> Tensor:
    """PIL image -> (3, H, W), bytes."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL image -> (3, H, W) in [0, 1]."""
    return to_bytes(image).float() / 255


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> PIL image."""
    return Image.fromarray((pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_png(
    path: Path, image: Image.Image, metadata: Mapping[str, object] | None = None, parameters: str | None = None
) -> None:
    """Write a PNG whole or not at all; `metadata` becomes its `p3s` text chunk, as JSON, `parameters` A1111's."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text("parameters", parameters)
    if metadata is not None:
        info.add_itxt("p3s", json.dumps(metadata, sort_keys=True))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_metadata(path: Path) -> dict | None:
    """The `p3s` JSON of a PNG that we wrote and that is whole; None for any other file."""
    try:
        with _opened(path, ("PNG",)) as image:
            image.load()
            metadata = json.loads(image.info["p3s"])
    except InputError:
        return None
    return metadata if isinstance(metadata, dict) else None


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> scaled latents (B, 4, H/8, W/8), the posterior's mean, float32."""
    pixels = (2 * images - 1).to(_device(vae), vae.dtype)
    return torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(8)]).float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, together: int = 4) -> Tensor:
    """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w) in [0, 1], float32 on the CPU, `together` at a time.

    What overflows in the autoencoder's own precision is decoded again in float32. NaN stays where that
    does not help, and is never clamped to a colour.
    """
    raw = latents / vae.config.scaling_factor
    decoded = torch.cat([_decode(vae, z) for z in raw.split(together)])
    bad = ~torch.isfinite(decoded).all(dim=(1, 2, 3))
    if bad.any() and vae.dtype != torch.float32:
        dtype = vae.dtype
        try:
            decoded[bad] = torch.cat([_decode(vae.float(), z) for z in raw[bad.to(raw.device)].split(1)])
        finally:
            vae.to(dtype)
    return torch.where(torch.isfinite(decoded), decoded.div(2).add(0.5).clamp(0, 1), torch.nan)


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents.to(_device(vae), vae.dtype)).sample.float().cpu()


def _device(vae: AutoencoderKL) -> torch.device:
    """Where it works: a model kept off the device (diffusers' offloading) is brought there by its own hook."""
    return getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
