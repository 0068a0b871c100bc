"""Named ways to score, so that a number always says how it was made. Two protocols never share a column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from p3s_cli.errors import InputError
from p3s_cli.evals.models import Preprocessing

_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = Preprocessing(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_WORLD = Preprocessing(128, 128, *_HALVES)


@dataclass(frozen=True)
class Metric:
    """One column.

    `against`: what results are compared with, a key of `kinds.KINDS`. `masked`: everything but the subject is black in
    both pictures.
    """

    name: str
    model: str  # a key of the protocol's models
    against: Literal["real", "text", "other_text", "selective", "labels", "x", "y"]
    masked: bool = False


@dataclass(frozen=True)
class Protocol:
    """Models by key (a hub id, perhaps `@revision`, or a path inside the family's folder), and the columns they give.

    `references`: compare with `all` real pictures of a subject, or with its `own` reference only.
    """

    name: str
    models: Mapping[str, tuple[str, Preprocessing]]
    metrics: tuple[Metric, ...]
    references: Literal["all", "own"] = "all"
    variances: Mapping[str, str] = field(default_factory=dict)  # column -> the metric whose variance it is


def _pair(image: str, model: str) -> tuple[Metric, ...]:
    return (
        Metric(image, model, "real"),
        Metric("CLIP-I", "clip", "real"),
        Metric("CLIP-T", "clip", "text"),
        Metric(f"{image}-M", model, "real", masked=True),
        Metric("CLIP-ES", "clip", "other_text"),
        Metric("selectivity", model, "selective"),
    )


# DINO ViT-S/16 CLS and CLIP ViT-B/32, mean over all (generated, real) pairs: what most tables quote.
_DREAMBOOTH = Protocol(
    "dreambooth",
    # the branches with safetensors: what is on `main` is a pickle
    {
        "dino": ("facebook/dino-vits16@refs/pr/1", _IMAGENET),
        "clip": ("openai/clip-vit-base-patch32@refs/pr/15", _CLIP),
    },
    _pair("DINO", "dino"),
)
# P3S-Diffusion, Sec. IV. Its backbones are not stated: DINOv2 base and CLIP ViT-L/14 are our reading.
_P3S = Protocol(
    "p3s",
    {"dino": ("facebook/dinov2-base", _IMAGENET), "clip": ("openai/clip-vit-large-patch14", _CLIP)},
    _pair("DINOv2", "dino"),
    variances={"CLIP-Iv": "CLIP-I", "DINO-v": "DINOv2"},
)
# As `dreambooth`, but against the one reference that the method was given.
_KOSMOS_G = Protocol("kosmos-g", _DREAMBOOTH.models, _DREAMBOOTH.metrics, references="own")
# The bundled family's own readers, which know the truth of its scenes.
_WORLD_PROTOCOL = Protocol(
    "world",
    {
        "identity": ("readers/identity", _WORLD),
        "clip": ("clip", _WORLD),
        "labels": ("readers/labels", _WORLD),
    },
    (
        Metric("selectivity", "identity", "selective"),
        Metric("identity", "identity", "real"),
        Metric("prompt", "labels", "labels"),
        Metric("CLIP-I", "clip", "real"),
        Metric("CLIP-T", "clip", "text"),
        Metric("identity-M", "identity", "real", masked=True),
        Metric("CLIP-ES", "clip", "other_text"),
        Metric("x", "clip", "x"),
        Metric("y", "clip", "y"),
    ),
    variances={"CLIP-Iv": "CLIP-I", "identity-v": "identity", "x-v": "x", "y-v": "y"},
)

PROTOCOLS = {p.name: p for p in (_DREAMBOOTH, _P3S, _KOSMOS_G, _WORLD_PROTOCOL)}


def protocol(name: str) -> Protocol:
    """Raises InputError for a name that is none of them."""
    if name not in PROTOCOLS:
        raise InputError(f"no protocol is called {name!r}; choose one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
