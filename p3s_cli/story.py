"""The main job as one short story on the bundled family, with ground truth at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from p3s_cli import pictures, stages
from p3s_cli.errors import InputError
from p3s_cli.evals.metrics import intersection_over_union, nearer
from p3s_cli.evals.models import MetricModel
from p3s_cli.evals.protocols import protocol
from p3s_cli.sd import images
from p3s_cli.sd.family import Family, load
from p3s_cli.sd.weights import load_tensors
from p3s_cli.world import seeds
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import PHOTO_SIZE, Placed, Scene, lookalike_scene, solo

_SCENE = seeds.SINGLE + 13  # one whose masks come out well
PROMPTS = ("on the beach", "in the snow", "in the jungle", "on top of pink fabric")
_IMAGES = 2  # of each prompt
_VIEWS = 16  # true renders of each subject that results are compared with


def demo(
    directory: Path | str = "p3s-demo",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    on_progress: stages.Progress | None = None,
) -> dict[str, Any]:
    """Draw two look-alikes, point at one, tune, generate eight images over four prompts (`fast`), and judge them.

    Each seed has a photo, a subject directory and a sheet of its own. Raises InputError if the directory holds another photo.
    Returns `{"seconds": ..., "mask_iou": ..., "selective": {"right", "of"}, "sheet"}`; `selective` counts
    the images that the family's identity encoder finds nearer to true pictures of the chosen subject than of the other.
    """
    report, root = on_progress or (lambda what, done, total: None), Path(directory)
    scene = lookalike_scene(_SCENE + seed)
    pixels, true_masks = render([scene], size=PHOTO_SIZE)
    photo, subject_dir, sheet = _places(root, seed)
    _check_place(photo, subject_dir, sheet, images.to_pil(pixels[0]))
    images.save_png(photo, images.to_pil(pixels[0]))
    chosen, other = scene.subjects
    family = load("world", device, dtype)
    common = {"family": family, "force": force, "on_progress": report}
    clock = _Clock()
    masked = stages.mask(
        photo,
        [click(true_masks[0, 0])],
        [click(true_masks[0, 1])],
        subject_dir,
        chosen.instance.category,
        seed=seed,
        **common,
    )
    clock.stop("mask")
    stages.finetune(subject_dir, seed=seed, **common)
    clock.stop("finetune")
    prompts = [f"a [V] {chosen.instance.category} {where}" for where in PROMPTS]
    made = [stages.generate(subject_dir, prompt, n=_IMAGES, seed=seed, fast=True, **common) for prompt in prompts]
    clock.stop("generate")
    tensors, _ = load_tensors(subject_dir / masked.reference / "mask.safetensors")
    iou = {
        n: intersection_over_union(tensors[n].bool(), true_masks[0, i]) for i, n in enumerate(("subject", "negative"))
    }
    encoder = identity_encoder(family)
    results = encoder.images([images.load_image(p) for r in made for p in r.images])
    right = nearer(results, *(encoder.images(true_pictures(placed, seed)) for placed in (chosen, other)))
    _contact_sheet(sheet, photo, masked, made, right, scene)
    return {
        "seconds": clock.seconds | {"total": round(sum(clock.seconds.values()), 1)},
        "mask_iou": {n: round(v, 3) for n, v in iou.items()},
        "selective": {"right": int(right.sum()), "of": len(right)},
        "sheet": str(sheet),
    }


def _places(root: Path, seed: int) -> tuple[Path, Path, Path]:
    """Photo, subject directory and sheet of this seed, which draws two individuals of its own."""
    of = f"-{seed}" if seed else ""
    return root / f"reference{of}.png", root / f"subject{of}", root / f"sheet{of}.png"


def _check_place(path: Path, subject_dir: Path, sheet: Path, photo: Image.Image) -> None:
    """Raises InputError for pictures of somebody's own, which would be lost, and for a subject with another photo: it would
    be tuned on two individuals."""
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent} is a file; name a folder for the demo")
    if path.exists() and images.pixel_hash(images.load_image(path)) != images.pixel_hash(photo):
        raise InputError(f"{path} is another picture than the demo's, and would be lost; name another folder")
    if sheet.exists() and not path.exists():  # a demo's own comes after its photo
        raise InputError(f"{sheet} is no demo's picture, and would be lost; name another folder")
    for kept in sorted(subject_dir.glob("references/*/photo.png")):
        if images.pixel_hash(images.load_image(kept)) != images.pixel_hash(photo):
            raise InputError(
                f"{kept} is not what this version of p3s draws for the demo; remove {subject_dir}, or name another folder"
            )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def stop(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._since = round(now - self._since, 1), now


def identity_encoder(family: Family) -> MetricModel:
    """What tells individuals apart in the drawn world."""
    where, preprocessing = protocol("world").models["identity"]
    return MetricModel(f"{family.folder}/{where}", preprocessing, family.device)


def true_pictures(placed: Placed, seed: int) -> list[Image.Image]:
    """The same individual, truly drawn in other scenes and poses."""
    scenes: list[Scene] = [solo(placed.instance, seeds.DEMO_VIEWS + 1000 * seed + k) for k in range(_VIEWS)]
    return [images.to_pil(picture) for picture in render(scenes)[0]]


def _contact_sheet(path: Path, photo: Path, masked: stages.MaskResult, made: list, right: Tensor, scene: Scene) -> None:
    by_name = {p.name: images.load_image(p) for p in masked.pictures}
    filled, _ = load_tensors(masked.subject / masked.reference / "mask.safetensors")
    inpainted = images.to_pil(filled["inpainted"].float() / 255)
    first = [
        ("reference", images.load_image(photo)),
        ("points and masks", by_name["overlay.png"]),
        ("negative removed", inpainted),
    ]
    tiles, verdicts = [], iter(right.tolist())
    for result in made:
        for file, seed in zip(result.images, result.seeds, strict=True):
            tiles.append(
                (f"{result.prompt} ({seed}) {'chosen' if next(verdicts) else 'OTHER'}", images.load_image(file))
            )
    rows = [("what was given", first), ("results", tiles[:4]), ("", tiles[4:])]
    images.save_png(path, pictures.sheet(rows, f"p3s demo: the {scene.subjects[0].instance.category} on the left"))


def table(result: dict[str, Any]) -> list[str]:
    """The demo's numbers as lines for a terminal."""
    lines = [f"{'stage':<10}{'seconds':>9}"]
    lines += [f"{name:<10}{value:>9.1f}" for name, value in result["seconds"].items()]
    iou, selective = result["mask_iou"], result["selective"]
    lines.append(f"mask IoU with the truth: subject {iou['subject']:.2f}, negative {iou['negative']:.2f}")
    lines.append(
        f"{selective['right']} of {selective['of']} results look like the chosen subject rather than the other"
    )
    return [*lines, f"look at {result['sheet']}"]
