"""The claim of the README's first screen, run for real."""

import json
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from p3s_cli import story
from p3s_cli.cli import app
from p3s_cli.errors import InputError, P3SError


def test_demo_selects_the_subject_that_was_pointed_at(tmp_path):
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "d"), "--json"])
    assert result.exit_code == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert set(numbers["seconds"]) == {"mask", "finetune", "generate", "total"}
    # the aim on any scene; this one gave 0.98 and 8 of 8, so that another machine's rounding has room
    assert min(numbers["mask_iou"].values()) >= 0.6
    assert numbers["selective"]["of"] == 8 and numbers["selective"]["right"] >= 6
    assert Path(numbers["sheet"]).is_file()  # how long it takes is for benchmarks/speed.py to say


def test_each_seed_has_a_subject_of_its_own_and_a_photo_of_another_version_is_refused(
    tmp_path, tiny_family, monkeypatch
):
    seen = []

    def tune(directory, **options):
        seen.append(directory)
        raise P3SError("far enough")

    monkeypatch.setattr(story, "load", lambda *_: tiny_family)
    monkeypatch.setattr(story.stages, "finetune", tune)
    for seed in (0, 1, 1):
        with pytest.raises(P3SError, match="far enough"):
            story.demo(tmp_path, seed)
    assert [d.name for d in seen] == ["subject", "subject-1", "subject-1"]
    assert all(len(list(d.glob("references/*"))) == 1 for d in seen)
    photos = [tmp_path / name for name in ("reference.png", "reference-1.png")]
    assert photos[0].read_bytes() != photos[1].read_bytes()
    own = tiny.photo(tmp_path / "own/reference.png").read_bytes()
    with pytest.raises(InputError, match="reference.png is another picture than the demo's, and would be lost"):
        story.demo(tmp_path / "own")
    assert (tmp_path / "own/reference.png").read_bytes() == own
    (tmp_path / "own/reference.png").rename(tmp_path / "own/sheet.png")
    with pytest.raises(InputError, match="sheet.png is no demo's picture, and would be lost"):
        story.demo(tmp_path / "own")
    tiny.photo(tmp_path / "subject/references/00/photo.png")
    with pytest.raises(InputError, match="photo.png is not what this version of p3s draws .*; remove .*subject, or"):
        story.demo(tmp_path)
