"""What `gpu.py` finds, told at once and kept after each part, so that nothing is lost when the time is up."""

from __future__ import annotations

import gc
import json
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from speed import peak_gigabytes
from tables import machine, markdown

BARS = {
    "300 steps, captured, seconds": 6.0,
    "train_step_vs_floor": 4.0,
    "generate_vs_plain": 1.9,
    "generate_captured_vs_plain": 1.35,
    "fast_vs_plain": 0.6,
}


class Report:
    """What was found, printed at once and kept on disk. `seconds` count from `started`, of `time.perf_counter`.

    `only` names the parts that are wanted; the first part is what all others stand on.
    """

    def __init__(self, out: Path, seconds: float, started: float, only: list[str] | None = None):
        self.out, self.seconds, self.started, self.only = out, seconds, started, only
        self.found: dict[str, float] = {}
        self._begun = False
        out.mkdir(parents=True, exist_ok=True)

    def tell(self, **numbers: float) -> None:
        for name, value in numbers.items():
            print(
                f"{time.perf_counter() - self.started:6.1f}  {name.replace('__', ', ').replace('_of_', ' of ')}: {value:.4g}",
                flush=True,
            )
        self.found |= numbers

    def part(self, what: str, cost: float, work: Callable[[], dict[str, float] | None]) -> None:
        """Do a part that takes about `cost` seconds on a card, if there are so many; with the most memory it took."""
        if self._begun and self.only and what not in self.only:
            return
        self._begun = True
        gone = time.perf_counter() - self.started
        if gone + cost > self.seconds:
            print(f"{gone:6.1f}  {what}: skipped, no time left", flush=True)
            return
        print(f"{gone:6.1f}  -- {what}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            self.tell(**(work() or {}))
            if torch.cuda.is_available():
                self.tell(**{f"peak GB, {what}": peak_gigabytes("cuda")})
        except Exception:
            print(f"{what} failed\n{traceback.format_exc()}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        rows = [{"what": n, "found": float(v), "bar": BARS.get(n, "")} for n, v in self.found.items()]
        (self.out / "speed-gpu.json").write_text(json.dumps({n: round(v, 5) for n, v in self.found.items()}))
        if rows:
            (self.out / "speed-gpu.md").write_text(f"{machine()}\n\n{markdown(rows)}\n")


class Dropped(logging.Handler):
    """Counts the recordings of passes that did not hold, and prints why; the optimiser's own makes no step an eager one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        logger = logging.getLogger("p3s_cli.sd.graphs")
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        # what follows a warning says where from
        self.count += record.levelno >= logging.WARNING and "optimiser" not in record.getMessage()
        print(f"        {self.format(record)}", flush=True)
