"""Whether a family's base is one that p3s can tune: SD v1-5, what was made from it, and what is built like it."""

from __future__ import annotations

from p3s_cli.errors import InputError
from p3s_cli.sd.family import Family


def check_base(family: Family) -> None:
    """Raises InputError, with the way out, for a base that is tuned to no avail or not at all.

    Its U-Net must take as many channels as it gives, predict noise, and need no more than time and the
    states of its own text encoder.
    """
    config, name = family.unet.config, family.source
    if config.in_channels != config.out_channels:
        raise InputError(
            f"{name} is an inpainting model ({config.in_channels} channels) and draws nothing of its own; "
            "tune on its base, and give this one to p3s mask as --inpainter"
        )
    kind = family.scheduler_config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise InputError(
            f"{name} predicts {kind} and not noise (epsilon), as SD 2.1 does at 768 pixels; "
            "tune on SD v1-5 or a model made from it"
        )
    if config.addition_embed_type:
        raise InputError(
            f"the U-Net of {name} wants {config.addition_embed_type} beside the prompt, as SDXL's does; "
            "tune on SD v1-5 or a model made from it"
        )
    written = family.text_encoder.config.hidden_size
    if written != config.cross_attention_dim:
        raise InputError(
            f"the U-Net of {name} reads text of width {config.cross_attention_dim} and its text encoder writes "
            f"{written}: they are not of one model; restore the folder"
        )
