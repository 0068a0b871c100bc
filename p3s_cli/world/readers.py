"""What the world's readers are asked: labels of an image by group, and which individual it shows.

Both are small ResNets of transformers, so `p3s eval` loads them as it loads any other metric model.
"""

from __future__ import annotations

from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from p3s_cli.world.scenes import BACKGROUNDS, Scene
from p3s_cli.world.shapes import ACCESSORIES, CATEGORIES, COLOURS, PATTERNS

BARE = "nothing"  # the accessory of a subject that wears none
GROUPS: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": tuple(BACKGROUNDS),
    "accessory": (*ACCESSORIES, BARE),
}
LABELS = tuple(f"{group}/{value}" for group, values in GROUPS.items() for value in values)


def true_labels(scene: Scene) -> set[str]:
    """Everything a reader should find in an image of this scene."""
    found = {f"background/{scene.background}"}
    for s in scene.subjects:
        found |= {f"category/{s.instance.category}", f"colour/{s.instance.colour}", f"pattern/{s.instance.pattern}"}
        found.add(f"accessory/{s.accessory or BARE}")
    return found


def build_label_reader() -> ResNetForImageClassification:
    """One logit a label; a group's answer is its largest."""
    config = _shape()
    config.num_labels = len(LABELS)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: i for i, label in enumerate(LABELS)}
    return ResNetForImageClassification(config)


def build_identity_encoder() -> ResNetModel:
    """Its pooled output is the identity vector (B, 192, 1, 1), compared by cosine: the world's stand-in for DINO."""
    return ResNetModel(_shape())


def _shape() -> ResNetConfig:
    return ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 192], depths=[1, 1, 1, 1], layer_type="basic")
