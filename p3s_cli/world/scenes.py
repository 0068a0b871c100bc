"""Scenes of the bundled world, with ground truth: who stands where, how they look, what a caption says.

A scene is data, drawn from a seed by `sample_scene`; `render.render` turns scenes into pixels and
true masks. An instance's look goes beyond what a caption can say (exact shades, second colour,
pattern scale and phase), so its identity has to be learned from pictures.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, replace
from typing import Literal

from p3s_cli.world.shapes import ACCESSORIES, CATEGORIES, COLOURS, PATTERNS

SIZE = 128  # pixels, square
PHOTO_SIZE = 2 * SIZE  # of a reference, as cameras give more pixels than a model draws
MAX_SUBJECTS = 3

# background -> the phrases a caption may use; the first is the canonical one
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "on beach"),
    "snow": ("in the snow", "in snow"),
    "jungle": ("in the jungle", "in jungle"),
    "wooden floor": ("on a wooden floor", "on top of a wooden floor"),
    "mountain": ("with a mountain in the background", "in front of a mountain"),
    "city": ("with a city in the background", "in the city"),
    "wheat field": ("with a wheat field in the background", "in a wheat field"),
    "pink fabric": ("on top of pink fabric", "on pink fabric"),
}

RGB = tuple[float, float, float]
Wording = Literal["full", "kind", "place"]


@dataclass(frozen=True)
class Instance:
    """One individual: everything that stays the same in all its pictures."""

    category: str
    colour: str  # the name a caption uses
    pattern: str
    body: RGB
    second: RGB
    pattern_period: float  # in the subject's own units
    pattern_phase: tuple[float, float]
    pattern_degrees: float


@dataclass(frozen=True)
class Placed:
    """An instance in a scene: centre and half size in pixels of a 128 px image, pose, accessory."""

    instance: Instance
    x: float
    y: float
    half_size: float
    degrees: float = 0.0
    flip: bool = False
    accessory: str | None = None


@dataclass(frozen=True)
class Scene:
    """Subjects from back to front over a background whose details follow from `look` (five numbers in [0, 1])."""

    subjects: tuple[Placed, ...]
    background: str
    look: tuple[float, float, float, float, float]


def _shade(rng: random.Random, rgb: RGB, spread: float) -> RGB:
    light = rng.uniform(1 - spread, 1 + spread)
    return tuple(min(1.0, max(0.0, c * light + rng.uniform(-spread, spread) / 2)) for c in rgb)  # type: ignore[return-value]


def sample_instance(rng: random.Random, category: str | None = None, colour: str | None = None) -> Instance:
    """Draw one individual; `category` and `colour` fix those parts."""
    colour = colour or rng.choice(list(COLOURS))
    other = rng.choice([c for c in COLOURS if c != colour])
    return Instance(
        category=category or rng.choice(CATEGORIES),
        colour=colour,
        pattern=rng.choice(PATTERNS),
        body=_shade(rng, COLOURS[colour], 0.14),
        second=_shade(rng, COLOURS[other], 0.14),
        pattern_period=rng.uniform(0.42, 0.70),
        pattern_phase=(rng.random(), rng.random()),
        pattern_degrees=rng.choice((0.0, 45.0, 90.0, 135.0)) + rng.uniform(-10, 10),
    )


def lookalike(rng: random.Random, of: Instance) -> Instance:
    """Another individual of the category of `of`, of another named colour and another pattern."""
    while True:
        other = sample_instance(rng, of.category)
        if other.colour != of.colour and other.pattern != of.pattern:
            return other


def _look(rng: random.Random) -> tuple[float, float, float, float, float]:
    return (rng.random(), rng.random(), rng.random(), rng.random(), rng.random())


def place(rng: random.Random, instances: list[Instance], accessory_share: float = 0.3) -> tuple[Placed, ...]:
    """Stand the instances side by side, never more than slightly overlapping."""
    n = len(instances)
    low, high = {1: (30, 46), 2: (25, 30), 3: (17, 20)}[n]
    lane = SIZE / n
    placed = []
    for i, instance in enumerate(instances):
        half = rng.uniform(low, high)
        slack = max(0.0, lane / 2 - half * (1.0 if n == 1 else 0.95))
        placed.append(
            Placed(
                instance,
                x=lane * (i + 0.5) + rng.uniform(-slack, slack),
                y=rng.uniform(62, min(86, SIZE - 2 - half)),
                half_size=half,
                degrees=rng.uniform(-12, 12),
                flip=rng.random() < 0.5,
                accessory=rng.choice(list(ACCESSORIES)) if rng.random() < accessory_share else None,
            )
        )
    return tuple(placed)


def sample_scene(seed: int, counts: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 2, 2, 2, 3)) -> Scene:
    """The scene of this seed: one to three subjects, half of the groups look-alikes of one category."""
    rng = random.Random(seed)
    n = rng.choice(counts)
    instances = [sample_instance(rng)]
    alike = rng.random() < 0.5
    while len(instances) < n:
        instances.append(lookalike(rng, instances[0]) if alike else sample_instance(rng))
    return Scene(place(rng, instances), rng.choice(list(BACKGROUNDS)), _look(rng))


def lookalike_scene(seed: int, category: str | None = None) -> Scene:
    """Two individuals of one category side by side, nobody wearing anything: what the demo selects from."""
    rng = random.Random(seed)
    first = sample_instance(rng, category)
    pair = [first, lookalike(rng, first)]
    return Scene(place(rng, pair, accessory_share=0.0), rng.choice(list(BACKGROUNDS)), _look(rng))


def again(scene: Scene, seed: int) -> Scene:
    """The same individuals, nobody wearing anything, in other places and poses in front of something else."""
    rng = random.Random(seed)
    placed = place(rng, [s.instance for s in scene.subjects], accessory_share=0.0)
    return Scene(placed, rng.choice([b for b in BACKGROUNDS if b != scene.background]), _look(rng))


def each_pattern(scene: Scene) -> list[Scene]:
    """The scene as many times as there are patterns: all subjects change theirs at once, everything else stays."""

    def changed(placed: Placed, by: int) -> Placed:
        pattern = PATTERNS[(PATTERNS.index(placed.instance.pattern) + by) % len(PATTERNS)]
        return replace(placed, instance=replace(placed.instance, pattern=pattern))

    return [replace(scene, subjects=tuple(changed(s, by) for s in scene.subjects)) for by in range(len(PATTERNS))]


def solo(instance: Instance, seed: int, background: str | None = None, accessory: str | None = None) -> Scene:
    """The same individual alone in another scene and pose: what a correct result may look like."""
    rng = random.Random(seed)
    (placed,) = place(rng, [instance], accessory_share=0.0)
    return Scene((replace(placed, accessory=accessory),), background or rng.choice(list(BACKGROUNDS)), _look(rng))


def describe(placed: Placed, rng: random.Random, full: bool = False) -> str:
    """A noun phrase for one subject, of varying completeness: "a striped red dog wearing a red hat"."""
    instance = placed.instance
    words = []
    if instance.pattern != "plain" and (full or rng.random() < 0.6):
        words.append(instance.pattern)
    if full or rng.random() < 0.7:
        words.append(instance.colour)
    elif rng.random() < 0.3:
        # a word without meaning: the text side learns that an unknown identifier says nothing by itself
        words.append("".join(rng.choices(string.ascii_lowercase, k=3)))
    noun = " ".join([*words, instance.category])
    article = "an" if noun[0] in "aeiou" else "a"
    wearing = (
        f" wearing {'' if placed.accessory.endswith('glasses') else 'a '}{placed.accessory}" if placed.accessory else ""
    )
    return f"{article} {noun}{wearing}"


def caption(scene: Scene, seed: int, full: bool = False) -> str:
    """A caption of the scene. Accessories and background are always named, colour and pattern often."""
    rng = random.Random(seed)
    kinds = {s.instance.category for s in scene.subjects}
    if len(scene.subjects) > 1 and len(kinds) == 1 and not full and rng.random() < 0.3:
        what = f"{'two' if len(scene.subjects) == 2 else 'three'} {_plural(kinds.pop())}"
    else:
        what = " and ".join(describe(s, rng, full) for s in scene.subjects)
    where = BACKGROUNDS[scene.background]
    prefix = "" if full else rng.choice(("", "", "a photo of ", "a picture of "))
    return f"{prefix}{what} {where[0] if full else rng.choice(where)}"


def short_caption(scene: Scene, wording: Literal["kind", "place"]) -> str:
    """Only what kinds of things are there, or only where: the words of a zero-shot question."""
    if wording == "place":
        return f"a photo {BACKGROUNDS[scene.background][0]}"
    kinds = dict.fromkeys(s.instance.category for s in scene.subjects)
    return "a photo of " + " and ".join(f"a {kind}" for kind in kinds)


def _plural(category: str) -> str:
    return category + "s"
