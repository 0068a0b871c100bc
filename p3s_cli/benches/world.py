"""The drawn world as a benchmark: held-out look-alikes, twelve prompts, and true pictures of everyone."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from p3s_cli import stages
from p3s_cli.atomic import sha256
from p3s_cli.benches.cases import Case, Prompt, check_photos, first_finder
from p3s_cli.benches.entries import References
from p3s_cli.evals.truth import Result, Truth
from p3s_cli.sd import images
from p3s_cli.sd.family import Family
from p3s_cli.world import seeds
from p3s_cli.world.readers import BARE
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import BACKGROUNDS, PHOTO_SIZE, Instance, Scene, again, describe, lookalike_scene, solo
from p3s_cli.world.shapes import CATEGORIES

CALIBRATION = ("true pictures", "true look-alike")
_VIEWS = 16  # true pictures of each individual
_DRESSED = (
    ("red hat", "snow"),
    ("black top hat", "city"),
    ("pink glasses", "jungle"),
    ("red hat", "beach"),
)


def prompts(category: str) -> tuple[Prompt, ...]:
    """Eight places with nothing worn, four of them with something."""
    worn = [(None, place) for place in BACKGROUNDS] + list(_DRESSED)
    made = []
    for accessory, place in worn:
        words = "" if accessory is None else f" wearing {'' if accessory.endswith('glasses') else 'a '}{accessory}"
        labels = {f"category/{category}", f"background/{place}", f"accessory/{accessory or BARE}"}
        made.append(Prompt(f"a [V] {category}{words} {BACKGROUNDS[place][0]}", frozenset(labels)))
    return tuple(made)


def cases(folder: Path, family: Family, numbers: Iterable[int], seed: int = 0, quick: bool = False) -> list[Case]:
    """Mask held-out scenes of two look-alikes, by number, one click on each; `quick` keeps every third prompt."""
    made = []
    for k in numbers:
        category = CATEGORIES[k % len(CATEGORIES)]
        number = _number(k, seed)
        scene = lookalike_scene(number, category)
        name = f"{k:02d}-{category}" + (f"-seed-{seed}" if seed else "")
        show = functools.partial(_show, folder, name, scene, number, family)
        directory = show(References())
        asked = prompts(category)
        made.append(Case(directory, asked[::3] if quick else asked, _truth(directory, family, scene, number), show))
    return made


def _show(folder: Path, name: str, scene: Scene, number: int, family: Family, references: References) -> Path:
    """The subject directory of a case, masked as asked; further photos show the same two elsewhere.

    Raises InputError if it holds other photos.
    """
    directory = folder / "-".join(filter(None, (name, references.name)))
    scenes = [
        scene,
        *(again(scene, seeds.BENCH_PHOTOS + 10 * (number - seeds.BENCH) + k) for k in range(1, references.photos)),
    ]
    pixels, masks = render(scenes, size=PHOTO_SIZE)
    photos = [images.to_pil(one) for one in pixels]
    check_photos(directory, photos, "a photo that this version of p3s draws otherwise")
    for k in range(references.photos):
        photo = folder / f"{name}{f'-{k}' if k else ''}.png"
        images.save_png(photo, photos[k])
        subject, other = masks[k, 0], masks[k, 1]
        stages.mask(
            photo,
            [click(subject)],
            [click(other)],
            directory,
            scene.subjects[0].instance.category,
            config=references.masking,
            truth=stages.Truth(subject.bool(), other.bool()) if references.true_masks else None,
            inpaint=references.inpaint,
            family=family,
        )
    return directory


def _truth(directory: Path, family: Family, scene: Scene, number: int) -> Truth:
    chosen, other = (s.instance for s in scene.subjects)
    (real, masked), (strangers, _) = (_portraits(instance, number) for instance in (chosen, other))
    text = describe(scene.subjects[1], random.Random(number), full=True)
    return Truth(directory.name, real, strangers, masked, text, first_finder(directory, family.vision))


def _number(k: int, seed: int) -> int:
    """The seed of the k-th scene of the bench with this seed."""
    return seeds.BENCH + 1_000 * seed + k


def _first_view(number: int) -> int:
    """The first of a hundred seeds for true pictures of a scene's two."""
    return seeds.BENCH_VIEWS + 100 * (number - seeds.BENCH)


def _portraits(instance: Instance, number: int) -> tuple[tuple[Image.Image, ...], tuple[Image.Image, ...]]:
    """The individual truly drawn alone, in other places and poses; and the same with everything else black."""
    views = [solo(instance, _first_view(number) + k) for k in range(_VIEWS)]
    pixels, masks = render(views)
    return tuple(map(images.to_pil, pixels)), tuple(map(images.to_pil, pixels * masks[:, :1]))


def calibration(case: Case, k: int, seed: int, folder: Path) -> dict[str, list[Result]]:
    """True pictures as if they were results: of scene k's chosen one (the ceiling) and of its look-alike (the floor).

    Their names say what is in them, for rows of a run of other prompts go on naming theirs.
    """
    number = _number(k, seed)
    scene, first = lookalike_scene(number, CATEGORIES[k % len(CATEGORIES)]), _first_view(number) + _VIEWS
    lines = {}
    for name, placed in zip(CALIBRATION, scene.subjects, strict=True):
        lines[name] = []
        for i, prompt in enumerate(case.prompts):
            place = next(label.split("/")[1] for label in prompt.labels if label.startswith("background/"))
            worn = next(label.split("/")[1] for label in prompt.labels if label.startswith("accessory/"))
            view = solo(placed.instance, first + i, place, None if worn == BARE else worn)
            picture = images.to_pil(render([view])[0][0])
            path = folder / name.replace(" ", "-") / f"{case.name}-{i:02d}-{images.pixel_hash(picture)[:8]}.png"
            images.save_png(path, picture)
            lines[name].append(Result(path, sha256(path), prompt.plain, i, prompt.labels))
    return lines
