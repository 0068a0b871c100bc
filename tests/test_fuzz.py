"""A short pass of `benchmarks/fuzz.py`: a valid object or a P3SError, and nothing else, whatever is given."""

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz


@pytest.mark.parametrize("name", fuzz.targets())
def test_no_input_makes_anything_stray(name, tmp_path):
    seen, strays = collections.Counter(), []
    fuzz.round_of(name, 60, 1, tmp_path, seen, lambda *what: strays.append(what))
    assert seen[name] >= 30 and not strays  # hypothesis may run out of new inputs before 60


def test_a_stray_exception_and_a_stray_file_are_counted(tmp_path, monkeypatch):
    def bad(folder, content):
        (folder / "left").write_bytes(b"")
        raise KeyError(content)

    monkeypatch.setattr(fuzz, "targets", lambda: {"bad": (bad, fuzz.make.JSON)})
    strays = []
    fuzz.round_of("bad", 5, 1, tmp_path, collections.Counter(), lambda *what: strays.append(what))
    assert len(strays) >= 2 and any("KeyError" in s[2] for s in strays) and any("left" in s[2] for s in strays)
