"""The main path as library functions: mask() -> finetune() -> generate(). The commands are thin over these.

Each stage reads and writes a subject directory (`subject.py`), does nothing where its inputs have not
changed (unless `force`), and reports through `on_progress(what, done, total)`. Nothing here prints.
A stage is loaded at its first use: masks need nothing of what tuning and drawing take seconds to import.
"""

# ruff: noqa: F401 (what is imported for type checkers is attached by name below)
from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from p3s_cli.stages.clicks import PhotoClicks, read_clicks
    from p3s_cli.stages.generating import GenerateResult, generate
    from p3s_cli.stages.grids import grid, grid_many
    from p3s_cli.stages.many import Failed, finetune_many, read_jobs
    from p3s_cli.stages.masking import MaskResult, mask, mask_many
    from p3s_cli.stages.progress import Progress
    from p3s_cli.stages.reference import Truth
    from p3s_cli.stages.sharing import ExportResult, ImportResult, export_subject, import_subject
    from p3s_cli.stages.tuning import FinetuneResult, finetune

_HOMES = {
    "clicks": ["PhotoClicks", "read_clicks"],
    "generating": ["GenerateResult", "generate"],
    "grids": ["grid", "grid_many"],
    "many": ["Failed", "finetune_many", "read_jobs"],
    "masking": ["MaskResult", "mask", "mask_many"],
    "progress": ["Progress"],
    "reference": ["Truth"],
    "sharing": ["ExportResult", "ImportResult", "export_subject", "import_subject"],
    "tuning": ["FinetuneResult", "finetune"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=_HOMES)
