"""The work behind `stages.mask`: P3S eq. 1-3 on a family's own models, and the files they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from p3s_cli import pictures
from p3s_cli.config import MaskConfig
from p3s_cli.errors import InputError, P3SError
from p3s_cli.manifest import Reference, Stage
from p3s_cli.methods.photos import mask_tensors
from p3s_cli.methods.views import close_view, look
from p3s_cli.paper import points as points_as_printed
from p3s_cli.paper.inpaint import Inpainted, fill_region, remove_negative
from p3s_cli.paper.points import Point, Selection
from p3s_cli.sd import images
from p3s_cli.sd.family import Family
from p3s_cli.sd.inpaint import inpainting_filler
from p3s_cli.sd.vision import VisionTower
from p3s_cli.sd.weights import save_tensors
from p3s_cli.segment.select import select
from p3s_cli.stages.clicks import resolve_box, resolve_points
from p3s_cli.subject import Subject, hashes

_CUT_BY_BOX = 0.1  # of the mask: less of it outside the box is a matter of its outline
# around the subject, in its sizes, when CLIP names it: right for 0.885 of 288 look-alikes of `world`, 0.844 with 0.15
_CONTEXT = 0.5


@dataclass(frozen=True)
class Clicks:
    """Points and an optional box (x0, y0, x1, y1), in pixels of the upright photo."""

    positive: list[tuple[float, float]]
    negative: list[tuple[float, float]]
    box: tuple[float, float, float, float] | None

    @classmethod
    def read(
        cls, positive: Sequence, negative: Sequence, box: str | Sequence[float] | None, width: int, height: int
    ) -> Clicks:
        """Raises InputError for what lies outside the photo, contradicts itself, or marks no subject."""
        limits = resolve_box(box, width, height) if box is not None else None
        wanted, unwanted = (resolve_points(p, width, height) for p in (positive, negative))
        if limits and not wanted:
            wanted = [((limits[0] + limits[2]) / 2, (limits[1] + limits[3]) / 2)]
        if not wanted:
            raise InputError("no positive point was given; mark the subject with --pos X,Y or --box X0,Y0,X1,Y1")
        pixels = {(int(x), int(y)) for x, y in unwanted}
        for x, y in wanted:
            if (int(x), int(y)) in pixels:
                raise InputError(
                    f"the point {x:g},{y:g} is both positive and negative; put the negative one elsewhere in the image, which is {width} wide and {height} high"
                )
            if limits and not (limits[0] <= x <= limits[2] and limits[1] <= y <= limits[3]):
                raise InputError(
                    f"the positive point {x:g},{y:g} lies outside the box; widen the box or move the point"
                )
        return cls(wanted, unwanted, limits)


@dataclass(frozen=True)
class Truth:
    """Masks that are known, (H, W) bool, to stand in the place of those that the points would give."""

    subject: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Masked:
    """Selection (maps and masks) and inpainted reference."""

    selection: Selection
    inpainted: Inpainted


def make(
    family: Family,
    tower: VisionTower,
    picture: Image.Image,
    clicks: Clicks,
    config: MaskConfig,
    seed: int,
    truth: Truth | None = None,
    inpaint: bool = True,
) -> Masked:
    """P3S eq. 1-3 for one photo, points in its pixels. With `truth`, its masks beside the points' similarity maps."""
    pixels, embed = images.to_tensor(picture), embedding(tower, config)
    features = embed(pixels)
    if not torch.isfinite(features).all():
        raise P3SError("what the vision tower sees in the photo is not finite; try --dtype float32")
    selection = select_masks(pixels, features, clicks.positive, clicks.negative, config)
    if clicks.box:
        selection = _bounded(selection, clicks.box)
    if truth is not None:
        selection = replace(selection, subject=truth.subject, negative=truth.negative, warnings=(), confidence=1.0)
    elif config.recipe != "paper":  # eq. 2 as printed often covers both; it warns, and stays what it is, for comparison
        _check_apart(selection, clicks)
    selection = replace(selection, warnings=(*selection.warnings, *_degenerate(selection, clicks)))
    patch = max(picture.height / features.shape[0], picture.width / features.shape[1])
    negative = selection.negative if inpaint else torch.zeros_like(selection.negative)
    region = fill_region(selection.subject, negative, config.dilate * patch)
    filler = inpainting_filler(family) if region.any() else None
    positive = _fractions(clicks.positive, pixels)
    inpainted = remove_negative(pixels, region, positive, embed, filler, seed, config.attempts)
    if filler and family.inpainter_missing:
        said = f"the base itself filled in for the look-alike, as {family.inpainter_missing}"
        selection = replace(selection, warnings=(*selection.warnings, said))
    return Masked(selection, inpainted)


def embedding(tower: VisionTower, config: MaskConfig) -> Callable[[Tensor], Tensor]:
    """How this recipe reads a photo (3, H, W): patch features (H_p, W_p, D)."""
    return tower.native_patches if config.recipe == "paper" else tower.patches


def select_masks(
    pixels: Tensor, features: Tensor, positive: Sequence[Point], negative: Sequence[Point], config: MaskConfig
) -> Selection:
    """P3S eq. 1-2, or the default recipe in their place. pixels (3, H, W) in [0, 1], features of `embedding`, points in pixels."""
    sides = _fractions(positive, pixels), _fractions(negative, pixels)
    if config.recipe == "paper":
        return points_as_printed.select(features, *sides, (pixels.shape[1], pixels.shape[2]), config)
    return select(pixels, features, *sides, config)


def _fractions(points: Sequence[Point], pixels: Tensor) -> list[Point]:
    """The middles of these pixels as fractions of the photo (3, H, W)."""
    return [((x + 0.5) / pixels.shape[2], (y + 0.5) / pixels.shape[1]) for x, y in points]


def _bounded(selection: Selection, box: tuple[float, float, float, float]) -> Selection:
    """The subject's mask inside the box alone, with a warning if that takes much of it away."""
    kept = selection.subject & box_mask(box, tuple(selection.subject.shape))
    lost = 1 - float(kept.sum() / selection.subject.sum().clamp(min=1))
    if lost <= _CUT_BY_BOX:
        return replace(selection, subject=kept)
    warning = f"the box cuts {lost:.0%} off what the points mark; widen it if the subject goes on beyond it"
    return replace(selection, subject=kept, warnings=(*selection.warnings, warning))


def _check_apart(selection: Selection, clicks: Clicks) -> None:
    """Raises InputError if what a point marks holds a point of the other kind: then it tells nothing apart."""
    height, width = selection.subject.shape
    for name, other, mask, points in (
        ("positive", "negative", selection.subject, clicks.negative),
        ("negative", "positive", selection.negative, clicks.positive),
    ):
        for x, y in points:
            if mask[int(y), int(x)]:
                raise InputError(
                    f"the {other} point {x:g},{y:g} lies in the same connected region as a {name} one (the image is "
                    f"{width} wide and {height} high); move them further apart, or bound the subject with --box"
                )


def _degenerate(selection: Selection, clicks: Clicks) -> list[str]:
    """Sentences about maps without contrast and masks without pixels."""
    warnings = []
    for name, points, similarity, mask in (
        ("positive", clicks.positive, selection.positive_map, selection.subject),
        ("negative", clicks.negative, selection.negative_map, selection.negative),
    ):
        if points and float(similarity.max() - similarity.min()) < 1e-3:
            warnings.append(f"the similarity map of the {name} point has no contrast; its mask means little")
        if points and not mask.any():
            warnings.append(f"the mask of the {name} point is empty; put the point in the middle of what it marks")
    return warnings


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """(H, W) bool, True inside the box."""
    x0, y0, x1, y1 = (round(v) for v in box)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[y0 : y1 + 1, x0 : x1 + 1] = True
    return inside


def write(folder: Path, reference: Reference, picture: Image.Image, made: Masked, stage: Stage) -> Stage:
    """Write a reference's files under `folder`; returns the stage's record, complete."""
    selection, inpainted = made.selection, made.inpainted
    names = {n: f"{reference.folder}/{n}" for n in ("photo.png", "overlay.png", "inpainted.png", "mask.safetensors")}
    filled = images.to_pil(inpainted.image)
    images.save_png(folder / names["photo.png"], picture)
    shown = pictures.overlay(
        picture, selection.subject.numpy(), selection.negative.numpy(), reference.positive, reference.negative
    )
    images.save_png(folder / names["overlay.png"], shown)
    images.save_png(
        folder / names["inpainted.png"],
        pictures.sheet([("", [("original", picture), (f"inpainted ({inpainted.filler})", filled)])]),
    )
    tensors = {
        "positive_map": selection.positive_map,
        "negative_map": selection.negative_map,
        "subject": selection.subject.to(torch.uint8),
        "negative": selection.negative.to(torch.uint8),
        "inpainted": (inpainted.image * 255).round().to(torch.uint8),
    }
    save_tensors(
        folder / names["mask.safetensors"],
        tensors,
        {"stage": "mask", "settings": stage.settings, "positive": reference.positive, "negative": reference.negative},
    )
    result = {
        "areas": {"subject": _share(selection.subject), "negative": _share(selection.negative)},
        "confidence": round(selection.confidence, 3),
        "filler": inpainted.filler,
        "similarity_before": inpainted.before,
        "similarity_after": inpainted.after,
        "warnings": [*selection.warnings, *_filling_warnings(inpainted)],
    }
    return stage.model_copy(update={"artifacts": hashes(folder, *names.values()), "result": result})


def write_maps(subject: Subject, reference: Reference, picture: Image.Image) -> Path:
    """Eq. 1's maps over the photo, for the eye; no artifact that anything depends on."""
    tensors = mask_tensors(subject, reference)
    shown = [(n, pictures.heatmap(picture, tensors[f"{n}_map"].numpy())) for n in ("positive", "negative")]
    path = subject.path(reference.maps_file)
    images.save_png(path, pictures.sheet([("similarity to the points", shown)]))
    return path


def _filling_warnings(inpainted: Inpainted) -> list[str]:
    if inpainted.filler == "none" or inpainted.after < inpainted.before:
        return []
    return ["what was painted over the negative still resembles the subject; look at inpainted.png"]


def _share(mask: Tensor) -> float:
    return round(mask.float().mean().item(), 4)


def guess_class(family: Family, picture: Image.Image, mask: Tensor) -> tuple[str, float]:
    """The family's noun that CLIP finds most like a square around the subject, with its softmax score.

    mask (H, W) bool; of an empty one, the whole photo counts.
    """
    crop = look(images.to_tensor(picture), close_view(mask, _CONTEXT), family.vision.native)
    nouns = list(family.profile.nouns)
    scores = family.vision.embed(crop[None]) @ family.vision.embed_text([f"a photo of a {n}" for n in nouns]).T
    share = torch.softmax(scores[0] * family.vision.logit_scale, dim=0)
    best = int(share.argmax())
    return nouns[best], round(share[best].item(), 4)
