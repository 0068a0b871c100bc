"""The work behind `stages.mask`: P3S eq. 1-3 on a family's own models, and the files they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from p3s_cli import pictures
from p3s_cli.config import MaskConfig
from p3s_cli.errors import InputError
from p3s_cli.methods.views import base_view, look
from p3s_cli.paper import points as points_as_printed
from p3s_cli.paper.inpaint import Inpainted, fill_region, remove_negative
from p3s_cli.paper.points import Selection
from p3s_cli.sd import images
from p3s_cli.sd.family import Family
from p3s_cli.sd.inpaint import inpainting_filler
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.segment.select import select
from p3s_cli.subject import Reference, Stage, Subject

Points = tuple[list[tuple[float, float]], list[tuple[float, float]]]


@dataclass(frozen=True)
class Masked:
    """Selection (maps and masks), inpainted reference, and its latent (4, h, w) in the family's square."""

    selection: Selection
    inpainted: Inpainted
    latent: Tensor


def check_points(positive: Sequence[tuple[float, float]], negative: Sequence[tuple[float, float]]) -> None:
    """Raises InputError without a positive point, or with one place marked as both."""
    if not positive:
        raise InputError("no positive point was given; mark the subject with --pos X,Y")
    for point in positive:
        if point in negative:
            raise InputError(
                f"the point {point[0]:g},{point[1]:g} is both positive and negative; put the negative one on the thing you do not mean"
            )


def make(family: Family, picture: Image.Image, points: Points, config: MaskConfig, seed: int) -> Masked:
    """P3S eq. 1-3 for one photo; points in its pixels."""
    pixels, profile = images.to_tensor(picture), family.profile
    literal = config.recipe == "paper"
    layers, side = ((-1,), None) if literal else (profile.feature_layers, profile.feature_side)

    def embed(image: Tensor) -> Tensor:
        return family.vision.patches(image, layers, side)

    positive, negative = (
        [((x + 0.5) / picture.width, (y + 0.5) / picture.height) for x, y in group] for group in points
    )
    features = embed(pixels)
    if literal:
        selection = points_as_printed.select(features, positive, negative, (picture.height, picture.width), config)
    else:
        selection = select(pixels, features, positive, negative, config)
    patch = max(picture.height / features.shape[0], picture.width / features.shape[1])
    region = fill_region(selection.subject, selection.negative, config.dilate * patch)
    filler = inpainting_filler(family) if region.any() else None
    inpainted = remove_negative(pixels, region, positive, embed, filler, seed, config.attempts)
    square = look(inpainted.image, base_view(selection.subject), profile.image_size)
    return Masked(selection, inpainted, images.encode(family.vae, square[None])[0])


def write(subject: Subject, reference: Reference, picture: Image.Image, made: Masked, stage: Stage) -> Stage:
    """Write a reference's files; returns the stage's record, complete."""
    selection, inpainted = made.selection, made.inpainted
    names = {n: f"{reference.folder}/{n}" for n in ("photo.png", "overlay.png", "inpainted.png", "mask.safetensors")}
    filled = images.to_pil(inpainted.image)
    images.save_png(subject.path(names["photo.png"]), picture)
    shown = pictures.overlay(
        picture, selection.subject.numpy(), selection.negative.numpy(), reference.positive, reference.negative
    )
    images.save_png(subject.path(names["overlay.png"]), shown)
    images.save_png(
        subject.path(names["inpainted.png"]),
        pictures.sheet([("", [("original", picture), (f"inpainted ({inpainted.filler})", filled)])]),
    )
    tensors = {
        "positive_map": selection.positive_map,
        "negative_map": selection.negative_map,
        "subject": selection.subject.to(torch.uint8),
        "negative": selection.negative.to(torch.uint8),
        "inpainted": (inpainted.image * 255).round().to(torch.uint8),
        "latent": made.latent,
    }
    # the latent is a record for other tools; training encodes its own views of the pixels
    save_tensors(
        subject.path(names["mask.safetensors"]),
        tensors,
        {"stage": "mask", "settings": stage.settings, "positive": reference.positive, "negative": reference.negative},
    )
    result = {
        "areas": {"subject": _share(selection.subject), "negative": _share(selection.negative)},
        "filler": inpainted.filler,
        "similarity_before": inpainted.before,
        "similarity_after": inpainted.after,
        "warnings": [*selection.warnings, *_filling_warnings(inpainted)],
    }
    return stage.model_copy(update={"artifacts": subject.record(*names.values()), "result": result})


def _filling_warnings(inpainted: Inpainted) -> list[str]:
    if inpainted.filler == "none" or inpainted.after < inpainted.before:
        return []
    return ["what was painted over the negative still resembles the subject; look at inpainted.png"]


def _share(mask: Tensor) -> float:
    return round(mask.float().mean().item(), 4)


def guess_class(family: Family, picture: Image.Image, subject: Subject, reference: Reference) -> tuple[str, float]:
    """The family's noun that CLIP finds most like a square around the subject, with its softmax score."""
    tensors, _ = load_tensors(subject.path(f"{reference.folder}/mask.safetensors"))
    mask = tensors["subject"].bool()
    rows, columns = np.where(mask.numpy())
    pixels = images.to_tensor(picture)
    pad = round(0.15 * max(np.ptp(rows), np.ptp(columns))) + 4
    crop = pixels[:, max(0, rows.min() - pad) : rows.max() + pad, max(0, columns.min() - pad) : columns.max() + pad]
    nouns = list(family.profile.nouns)
    scores = family.vision.embed(crop[None]) @ family.vision.embed_text([f"a photo of a {n}" for n in nouns]).T
    share = torch.softmax(scores[0] * family.vision.logit_scale, dim=0)
    best = int(share.argmax())
    return nouns[best], round(share[best].item(), 4)
