"""The main path as library functions: mask() -> finetune() -> generate(). The commands are thin over these.

Each stage reads and writes a subject directory (`subject.py`), does nothing where its inputs have not
changed (unless `force`), and reports through `on_progress(what, done, total)`. Nothing here prints.
"""

from p3s_cli.stages.clicks import PhotoClicks, read_clicks
from p3s_cli.stages.generating import GenerateResult, generate
from p3s_cli.stages.many import Failed, finetune_many, read_jobs
from p3s_cli.stages.masking import MaskResult, grid, grid_many, mask, mask_many
from p3s_cli.stages.progress import Progress
from p3s_cli.stages.reference import Truth
from p3s_cli.stages.sharing import ExportResult, ImportResult, export_subject, import_subject
from p3s_cli.stages.tuning import FinetuneResult, finetune

__all__ = [
    "ExportResult",
    "Failed",
    "FinetuneResult",
    "GenerateResult",
    "ImportResult",
    "MaskResult",
    "PhotoClicks",
    "Progress",
    "Truth",
    "export_subject",
    "finetune",
    "finetune_many",
    "generate",
    "grid",
    "grid_many",
    "import_subject",
    "mask",
    "mask_many",
    "read_jobs",
    "read_clicks",
]
