"""diffusers and transformers without their notices and progress bars, which are for their own users; ours read one sentence.

diffusers is imported at first need: that takes longer than masks take to find, and these need none of it.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from types import ModuleType

import transformers


def _quiet(library: ModuleType) -> ModuleType:
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@cache
def diffusers() -> ModuleType:
    """The library, quiet."""
    import diffusers as library

    return _quiet(library)


_quiet(transformers)
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # which it reads on import, for parts of ours import it by name
if "diffusers" in sys.modules:
    diffusers()
