"""What tuning and drawing took when it was done, and how many steps fit into a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from p3s_cli.atomic import replacing
from p3s_cli.errors import InputError


class Ledger:
    """Measured numbers (seconds, steps that fit into them) by kind and name, in a file that a run goes on with.

    What is in other files is known, too.
    """

    def __init__(self, path: Path, others: Sequence[Path] = ()):
        self.path, self._numbers = path, _numbers(path)
        self._known = [self._numbers, *map(_numbers, others)]

    def add(self, kind: str, name: str, value: float) -> None:
        self._numbers.setdefault(kind, {})[name] = round(value, 3)
        self._write()

    def drop(self, kind: str, name: str) -> None:
        """What is no longer so."""
        if name in self._numbers.get(kind, {}):
            del self._numbers[kind][name]
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self._numbers, indent=1))

    def of(self, kind: str, name: str) -> float | None:
        return next((found[kind][name] for found in self._known if name in found.get(kind, {})), None)

    def elsewhere(self, kind: str, name: str) -> float | None:
        """What another file says where this one says nothing."""
        return None if name in self._numbers.get(kind, {}) else self.of(kind, name)

    def mean(self, kind: str, own: bool = False) -> float | None:
        """Over names; with `own`, of what this file says alone."""
        values: dict[str, float] = {}
        for found in [self._numbers] if own else reversed(self._known):  # of what several files say, the run's own
            values |= found.get(kind, {})
        return sum(values.values()) / len(values) if values else None


def _numbers(path: Path) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, dict[str, FiniteFloat]]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path} is damaged; remove it, and what is made from now on is measured again") from error
