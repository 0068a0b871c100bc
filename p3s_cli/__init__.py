"""Selective subject-driven image generation: point at the thing you mean, then generate that very thing.

    from p3s_cli import mask, finetune, generate

The functions are loaded when first used, so importing this package does not import torch. No module has a function's name:
it would take the function's place once it is imported.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
_STAGES = ("export_subject", "finetune", "finetune_many", "generate", "import_subject", "mask")
_BENCHES = ("evaluate_dreambench", "evaluate_subject", "evaluate_world")
__all__ = ["P3SPipeline", "demo", *_STAGES, *_BENCHES]


def __getattr__(name: str) -> Any:
    if name == "demo":
        from p3s_cli.story import demo

        return demo
    if name == "P3SPipeline":
        from p3s_cli.pipeline import P3SPipeline

        return P3SPipeline
    if name in _STAGES:
        from p3s_cli import stages

        return getattr(stages, name)
    if name in _BENCHES:
        from p3s_cli import benches

        return getattr(benches, name)
    raise AttributeError(name)
