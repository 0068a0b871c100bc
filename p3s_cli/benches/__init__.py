"""`p3s eval`: what is evaluated (a subject, DreamBench, the drawn world), by whom, and the run that scores it."""

from p3s_cli.benches.ending import EvalResult
from p3s_cli.benches.evaluate import (
    evaluate,
    evaluate_dreambench,
    evaluate_subject,
    evaluate_world,
    self_check,
)

__all__ = ["EvalResult", "evaluate", "evaluate_dreambench", "evaluate_subject", "evaluate_world", "self_check"]
