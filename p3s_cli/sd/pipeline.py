"""A family's parts as one of diffusers' own pipelines, for what diffusers does better than we would."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline

from p3s_cli.sd.family import Family


def pipeline(kind: type[DiffusionPipeline], family: Family, **parts: Any) -> Any:
    """A pipeline of this kind on the family's own models; `parts` stand in for some of them."""
    own = {
        "vae": family.vae,
        "text_encoder": family.text_encoder,
        "tokenizer": family.tokenizer,
        "scheduler": DDIMScheduler.from_config(family.scheduler_config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if "unet" not in parts:
        own["unet"] = family.unet
    made = kind(**own | parts)
    made.set_progress_bar_config(disable=True)
    return made
