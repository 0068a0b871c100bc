"""P3S and its rivals under one contract (`base.Method`). Importing this names them; torch comes with the first `get`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from p3s_cli.errors import InputError

if TYPE_CHECKING:
    from p3s_cli.methods.base import Method

_HOMES = {  # name -> the module that registers it
    "p3s": "p3s",
    "dreambooth": "dreambooth",
    "dreambooth-prior": "dreambooth",
    "lora": "lora",
    "textual-inversion": "textual_inversion",
    "custom-diffusion": "custom_diffusion",
    "break-a-scene": "break_a_scene",
    "untuned": "untuned",
}
NAMES = tuple(_HOMES)


def get(name: str) -> Method:
    """The method of this name. Raises InputError for a name that none has."""
    if name not in _HOMES:
        raise InputError(f"no method is called {name!r}; choose one of: {', '.join(NAMES)}")
    importlib.import_module(f"{__name__}.{_HOMES[name]}")
    from p3s_cli.methods.base import REGISTRY

    return REGISTRY[name]
