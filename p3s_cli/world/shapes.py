"""What the world's subjects are made of: a table of primitives for each category, no torch.

Coordinates are the subject's own: x right, y down, the subject fills about [-1, 1] x [-1, 1] and
stands on y = 1. A primitive is drawn over those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

BODY, SECOND, INK, LIGHT, BEAK = "body", "second", "ink", "light", "beak"


@dataclass(frozen=True)
class Primitive:
    """One flat shape. `extra`: a box's corner radius, a wedge's top/bottom width, a ring's thickness."""

    kind: str  # ellipse | box | wedge | ring
    x: float
    y: float
    half_width: float
    half_height: float
    degrees: float = 0.0
    extra: float = 0.0
    material: str = BODY


@dataclass(frozen=True)
class Anatomy:
    """A category's shapes, and where it wears a hat (`top`) and glasses (`face`): x, y, half width."""

    primitives: tuple[Primitive, ...]
    top: tuple[float, float, float]
    face: tuple[float, float, float]


def _ellipse(x, y, w, h, material=BODY, degrees=0.0) -> Primitive:
    return Primitive("ellipse", x, y, w, h, degrees, 0.0, material)


def _box(x, y, w, h, material=BODY, radius=0.06) -> Primitive:
    return Primitive("box", x, y, w, h, 0.0, radius, material)


def _wedge(x, y, w, h, material=BODY, top=0.0, degrees=0.0) -> Primitive:
    return Primitive("wedge", x, y, w, h, degrees, top, material)


def _ring(x, y, w, h) -> Primitive:
    return Primitive("ring", x, y, w, h, 0.0, 0.09, SECOND)


ANATOMY: dict[str, Anatomy] = {
    "dog": Anatomy(
        (
            _ellipse(-0.80, -0.02, 0.10, 0.34, BODY, -35),
            _box(-0.52, 0.72, 0.12, 0.28),
            _box(-0.26, 0.74, 0.11, 0.26, SECOND),
            _box(0.14, 0.74, 0.11, 0.26, SECOND),
            _box(0.38, 0.72, 0.12, 0.28),
            _ellipse(-0.08, 0.28, 0.66, 0.36),
            _ellipse(0.50, -0.34, 0.40, 0.36),
            _ellipse(0.80, -0.20, 0.22, 0.16, SECOND),
            _ellipse(0.98, -0.26, 0.07, 0.06, INK),
            _ellipse(0.28, -0.28, 0.13, 0.32, SECOND, 12),
            _ellipse(0.60, -0.46, 0.06, 0.08, INK),
        ),
        top=(0.48, -0.64, 0.36),
        face=(0.56, -0.44, 0.34),
    ),
    "cat": Anatomy(
        (
            _ellipse(0.58, 0.52, 0.11, 0.46, SECOND, 28),
            _ellipse(0.0, 0.48, 0.48, 0.54),
            _ellipse(0.0, 0.62, 0.22, 0.32, SECOND),
            _wedge(-0.32, -0.72, 0.20, 0.26, SECOND, 0.0, -12),
            _wedge(0.32, -0.72, 0.20, 0.26, SECOND, 0.0, 12),
            _ellipse(0.0, -0.32, 0.50, 0.40),
            _ellipse(-0.20, -0.38, 0.08, 0.11, INK),
            _ellipse(0.20, -0.38, 0.08, 0.11, INK),
            _ellipse(0.0, -0.20, 0.07, 0.05, LIGHT),
        ),
        top=(0.0, -0.66, 0.40),
        face=(0.0, -0.38, 0.42),
    ),
    "duck": Anatomy(
        (
            _box(-0.12, 0.88, 0.07, 0.14, BEAK),
            _box(0.18, 0.88, 0.07, 0.14, BEAK),
            _wedge(-0.82, 0.10, 0.20, 0.28, BODY, 0.0, -50),
            _ellipse(-0.05, 0.38, 0.76, 0.42),
            _ellipse(0.42, -0.02, 0.22, 0.42),
            _ellipse(0.48, -0.46, 0.36, 0.34),
            _ellipse(-0.18, 0.34, 0.40, 0.22, SECOND, -8),
            _box(0.88, -0.40, 0.20, 0.10, BEAK, 0.08),
            _ellipse(0.58, -0.54, 0.07, 0.08, INK),
        ),
        top=(0.46, -0.74, 0.34),
        face=(0.54, -0.52, 0.32),
    ),
    "robot": Anatomy(
        (
            _box(0.0, -0.90, 0.04, 0.14, INK, 0.02),
            _box(-0.24, 0.82, 0.15, 0.20, SECOND),
            _box(0.24, 0.82, 0.15, 0.20, SECOND),
            _box(-0.66, 0.24, 0.12, 0.34, SECOND, 0.1),
            _box(0.66, 0.24, 0.12, 0.34, SECOND, 0.1),
            _box(0.0, 0.24, 0.50, 0.44, BODY, 0.08),
            _box(0.0, -0.48, 0.42, 0.30, BODY, 0.08),
            _box(0.0, -0.48, 0.32, 0.16, LIGHT, 0.06),
            _ellipse(-0.15, -0.48, 0.08, 0.10, INK),
            _ellipse(0.15, -0.48, 0.08, 0.10, INK),
        ),
        top=(0.0, -0.76, 0.38),
        face=(0.0, -0.48, 0.40),
    ),
    "vase": Anatomy(
        (
            _wedge(0.0, 0.84, 0.34, 0.18, SECOND, 0.6),
            _box(0.0, -0.44, 0.20, 0.40, BODY, 0.02),
            _ellipse(0.0, 0.24, 0.58, 0.56),
            _wedge(0.0, -0.82, 0.24, 0.14, SECOND, 1.5),
            _box(0.0, -0.30, 0.22, 0.07, SECOND, 0.03),
        ),
        top=(0.0, -0.92, 0.34),
        face=(0.0, 0.10, 0.42),
    ),
    "car": Anatomy(
        (
            _wedge(-0.08, -0.18, 0.62, 0.34, BODY, 0.55),
            _wedge(-0.30, -0.14, 0.24, 0.22, LIGHT, 0.65),
            _wedge(0.16, -0.14, 0.24, 0.22, LIGHT, 0.65),
            _box(0.0, 0.32, 0.98, 0.32, BODY, 0.16),
            _box(0.0, 0.50, 0.98, 0.07, SECOND, 0.04),
            _ellipse(0.88, 0.26, 0.09, 0.09, LIGHT),
            _ellipse(-0.52, 0.66, 0.28, 0.28, INK),
            _ellipse(0.52, 0.66, 0.28, 0.28, INK),
            _ellipse(-0.52, 0.66, 0.13, 0.13, LIGHT),
            _ellipse(0.52, 0.66, 0.13, 0.13, LIGHT),
        ),
        top=(-0.08, -0.48, 0.38),
        face=(-0.08, -0.12, 0.44),
    ),
    "backpack": Anatomy(
        (
            _ring(0.0, -0.72, 0.22, 0.20),
            _ellipse(-0.66, 0.34, 0.14, 0.52, SECOND),
            _ellipse(0.66, 0.34, 0.14, 0.52, SECOND),
            _box(0.0, 0.16, 0.62, 0.82, BODY, 0.34),
            _box(0.0, 0.52, 0.44, 0.32, SECOND, 0.12),
            _box(0.0, 0.34, 0.32, 0.035, INK, 0.02),
            _box(0.0, -0.26, 0.40, 0.035, INK, 0.02),
        ),
        top=(0.0, -0.64, 0.38),
        face=(0.0, -0.06, 0.42),
    ),
    "teapot": Anatomy(
        (
            _ring(-0.72, 0.20, 0.24, 0.32),
            _wedge(0.74, 0.06, 0.16, 0.42, SECOND, 0.45, 38),
            _box(0.0, 0.86, 0.40, 0.10, SECOND, 0.04),
            _ellipse(0.0, 0.28, 0.66, 0.56),
            _ellipse(0.0, -0.26, 0.38, 0.13, SECOND),
            _ellipse(0.0, -0.46, 0.12, 0.13, SECOND),
        ),
        top=(0.0, -0.50, 0.34),
        face=(0.0, 0.16, 0.44),
    ),
}

CATEGORIES = tuple(ANATOMY)

# Accessories are drawn in a frame of their own: origin at the anchor, unit = the anchor's half width.
# Their materials are plain RGB colours.
ACCESSORIES: dict[str, tuple[str, tuple[tuple[Primitive, tuple[float, float, float]], ...]]] = {
    "red hat": (
        "top",
        (
            (_wedge(0.0, -0.55, 0.80, 0.55, top=0.35), (0.86, 0.12, 0.14)),
            (_box(0.0, 0.0, 1.10, 0.17, radius=0.15), (0.97, 0.95, 0.93)),
            (_ellipse(0.0, -1.15, 0.24, 0.24), (0.97, 0.95, 0.93)),
        ),
    ),
    "black top hat": (
        "top",
        (
            (_box(0.0, -0.70, 0.66, 0.70, radius=0.04), (0.10, 0.10, 0.13)),
            (_box(0.0, -0.26, 0.68, 0.16, radius=0.02), (0.75, 0.70, 0.25)),
            (_box(0.0, 0.0, 1.15, 0.14, radius=0.08), (0.10, 0.10, 0.13)),
        ),
    ),
    "pink glasses": (
        "face",
        (
            (_box(0.0, 0.0, 1.00, 0.10, radius=0.04), (0.98, 0.32, 0.66)),
            (_ellipse(-0.52, 0.02, 0.44, 0.42), (0.98, 0.32, 0.66)),
            (_ellipse(0.52, 0.02, 0.44, 0.42), (0.98, 0.32, 0.66)),
            (_ellipse(-0.52, 0.02, 0.27, 0.25), (0.80, 0.93, 0.98)),
            (_ellipse(0.52, 0.02, 0.27, 0.25), (0.80, 0.93, 0.98)),
        ),
    ),
}

# Named body colours; an instance's exact shade is drawn around one of these.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.18, 0.18),
    "orange": (0.95, 0.55, 0.14),
    "yellow": (0.95, 0.85, 0.24),
    "green": (0.24, 0.66, 0.30),
    "blue": (0.20, 0.40, 0.86),
    "purple": (0.56, 0.28, 0.74),
    "brown": (0.50, 0.31, 0.18),
    "white": (0.93, 0.92, 0.90),
}
PATTERNS = ("plain", "spotted", "striped", "checkered")
