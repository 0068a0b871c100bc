"""What happens to a subject when its process ends early, its files vanish, or its numbers break.

`benchmarks/faults.py` does the killing on a larger scale; here it is done a few times.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError
from test_atomic import file_size_limit, small_disk  # noqa: F401

from p3s_cli import cli, signals, stages
from p3s_cli.errors import InputError, P3SError
from p3s_cli.sd import images, weights
from p3s_cli.sd.train import Checkpoint
from p3s_cli.sd.vision import VisionTower
from p3s_cli.sd.weights import load_tensors, save_tensors
from p3s_cli.subject import Subject

ROOT = Path(__file__).parent.parent
PROMPT = "a [V] thing on beach"


@pytest.fixture
def photo(tmp_path):
    return tiny.photo(tmp_path / "two.png")


@pytest.fixture
def subject(tmp_path, photo, tiny_family):
    return stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "thing", "thing", family=tiny_family).subject


@pytest.fixture
def tuned(subject, tiny_family):
    stages.finetune(subject, steps=1, family=tiny_family)
    return subject


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_instants_it_ends_with_the_same_bytes():
    command = [
        sys.executable,
        "benchmarks/faults.py",
        "--kills",
        "6",
        "--json",
    ]  # each signal to the stages and to eval
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads(out.stdout)
    assert (found["kills"], found["survived"], found["equal"]) == (6, 6, 6), out.stderr
    assert found["in_time"] > 0  # of six random instants one at least lies within the work


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_line_ends_with_the_code_of_the_signal_and_one_sentence(number, monkeypatch, capsys):
    monkeypatch.setattr(stages, "finetune", lambda **_: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["p3s", "finetune", "thing"])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "p3s: interrupted; the same command goes on from what is done\n"


def test_a_signal_while_tensors_are_read_is_no_damage(tmp_path, monkeypatch):
    """safetensors calls torch from its own code, where an exception of ours is lost, and fails in its own words."""

    class Reading:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return ["a"]

        def get_tensor(self, name):
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException as lost:
                raise SafetensorError("could not determine the shape") from lost
            return torch.ones(2)

    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    monkeypatch.setattr(weights, "safe_open", lambda *_, **__: Reading())
    with pytest.raises(signals.Interrupted), signals.raising():
        load_tensors(tmp_path / "x.safetensors")


def test_a_signal_that_waits_for_what_then_fails_is_not_forgotten():
    """Or a run that is out of memory, and has been told to stop, would begin again with less."""
    with pytest.raises(signals.Interrupted), signals.raising(), signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        raise MemoryError


def test_a_run_stopped_by_a_signal_has_a_checkpoint_and_goes_on_to_the_same_manifest(subject, tiny_family, tmp_path):
    shutil.copytree(subject, tmp_path / "other")
    stages.finetune(subject, steps=4, family=tiny_family)

    def terminate(what, done, total):
        if what.startswith("tuning") and done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(signals.Interrupted), signals.raising():
        stages.finetune(tmp_path / "other", steps=4, family=tiny_family, on_progress=terminate)
    (checkpoint,) = (tmp_path / "other/control").iterdir()
    assert [p.name for p in checkpoint.iterdir()] == ["step-00000002"]
    stages.finetune(tmp_path / "other", steps=4, family=tiny_family)
    assert contents(subject) == contents(tmp_path / "other")


def test_two_runs_with_the_same_seed_are_the_same_bytes(photo, tiny_family, tmp_path):
    found = []
    for name in ("a", "b"):
        root = tmp_path / name / "thing"
        stages.mask(photo, [(18, 32)], [(46, 32)], root, "thing", family=tiny_family)
        stages.finetune(root, steps=2, family=tiny_family)
        stages.generate(root, PROMPT, n=2, steps=2, family=tiny_family)
        found.append(contents(root))
    assert found[0] == found[1] and len(found[0]) == 10


def test_a_quota_in_mid_run_costs_nothing(subject, tiny_family, tmp_path, monkeypatch):
    """Photo and masks fit into the limit, the state of the training, kept after every step, does not."""
    monkeypatch.setattr("p3s_cli.stages.tuning.Checkpoint", functools.partial(Checkpoint, every=0.0))
    shutil.copytree(subject, tmp_path / "other")
    stages.finetune(subject, steps=2, family=tiny_family)
    before = contents(tmp_path / "other")
    with file_size_limit(100_000), pytest.raises(P3SError, match="step-00000001.*File too large.* are free"):
        stages.finetune(tmp_path / "other", steps=2, family=tiny_family)
    assert contents(tmp_path / "other") == before
    stages.finetune(tmp_path / "other", steps=2, family=tiny_family)
    assert contents(subject) == contents(tmp_path / "other")


def test_every_stage_is_deterministic_while_it_computes_if_it_is_asked_to_be(photo, tiny_family, tmp_path):
    seen = []

    def heard(what, done, total):
        seen.append((what.split()[0], torch.are_deterministic_algorithms_enabled()))

    asked = {"family": tiny_family, "deterministic": True, "on_progress": heard}
    subject = stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "thing", "thing", **asked).subject
    stages.finetune(subject, steps=1, **asked)
    stages.generate(subject, PROMPT, n=1, steps=1, **asked)
    assert {("finding", True), ("tuning,", True), ("images", True)} <= set(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def fill(disk, leave):
    """Take the disk's room but for `leave` bytes; returns the file that has it."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return filler


@pytest.mark.parametrize("room", [0, 20_000, 100_000])
def test_a_disk_that_fills_up_costs_nothing_at_any_stage(photo, tiny_family, tmp_path, small_disk, room):  # noqa: F811
    """Really full, at the lock, at the first file or in the middle; with room again the same command goes on."""
    root, other = small_disk / "thing", tmp_path / "other"
    work = (
        lambda d: stages.mask(photo, [(18, 32)], [(46, 32)], d, "thing", family=tiny_family),
        lambda d: stages.finetune(d, steps=1, family=tiny_family),
        lambda d: stages.generate(d, PROMPT, n=6, steps=1, size="128x128", family=tiny_family),
    )
    refused = 0
    for stage in work:
        stage(other)
        before, filler = contents(root) if root.exists() else {}, fill(small_disk, room)
        try:
            stage(root)
        except P3SError as error:
            refused += 1
            assert str(small_disk) in str(error) and "No space left on device" in str(error)
            now = contents(root) if root.exists() else {}
            assert before.items() <= now.items()  # and of generate's images those that were whole
            assert not any("p3s-" in name for name in now)
        filler.unlink()
        stage(root)
    assert contents(root) == contents(other) and refused >= 1


def test_no_stage_writes_beside_another_writer(tuned, photo, tiny_family):
    from p3s_cli.lock import writing

    before = contents(tuned)
    with writing(tuned, "p3s something"):
        for stage in (
            lambda: stages.mask(photo, [(18, 32)], output=tuned, family=tiny_family),
            lambda: stages.finetune(tuned, steps=2, family=tiny_family),
            lambda: stages.generate(tuned, PROMPT, n=1, steps=1, family=tiny_family),
            lambda: stages.export_subject(tuned, tuned.parent / "x.p3s.safetensors", family=tiny_family),
        ):
            with pytest.raises(P3SError, match="is being written by p3s something, process"):
                stage()
    assert contents(tuned) == before and not (tuned.parent / "x.p3s.safetensors").exists()


def test_only_missing_images_are_made_and_they_are_the_same(tuned, tiny_family):
    """Five images are two batches; of a batch whose other images are there, the missing one keeps its bytes."""
    made = stages.generate(tuned, PROMPT, n=5, steps=2, family=tiny_family)
    before = contents(tuned)
    kept = made.images[0].stat().st_mtime_ns
    made.images[1].unlink()
    made.images[4].write_bytes(made.images[4].read_bytes()[:-20])
    stages.generate(tuned, PROMPT, n=5, steps=2, family=tiny_family)
    assert contents(tuned) == before and made.images[0].stat().st_mtime_ns == kept


def test_a_mask_removed_in_mid_run_is_noticed_by_the_next_stage(subject, tiny_family):
    def remove(what, done, total):
        (subject / "references/00/mask.safetensors").unlink(missing_ok=True)

    with pytest.raises(InputError, match="mask.safetensors does not exist|does not belong"):
        stages.finetune(subject, steps=1, family=tiny_family, on_progress=remove)
        stages.generate(subject, PROMPT, n=1, steps=1, family=tiny_family)


def test_a_subject_removed_in_mid_run_does_not_come_back_by_halves(subject, tiny_family):
    def remove(what, done, total):
        if what.startswith("tuning"):
            shutil.rmtree(subject)

    with pytest.raises(P3SError, match="was removed while"):
        stages.finetune(subject, steps=1, family=tiny_family, on_progress=remove)
    assert not subject.exists()


def test_an_image_that_is_not_finite_fails_alone(tuned, tiny_family, monkeypatch):
    decode = images.decode

    def broken(vae, latents, together):
        decoded = decode(vae, latents, together)
        decoded[1, 0, 0, 0] = torch.nan
        return decoded

    monkeypatch.setattr(images, "decode", broken)
    with pytest.raises(P3SError, match=r"seeds \[8\] came out with numbers that are not finite"):
        stages.generate(tuned, PROMPT, n=3, seed=7, steps=2, family=tiny_family)
    assert [p.name[-8:-4] for p in sorted((tuned / "outputs").iterdir())] == ["0007", "0009"]


class Overflowing(torch.nn.Module):
    """An autoencoder that overflows below float32 for latents above one, and in every precision above ten."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"scaling_factor": 1.0})()
        self.device = torch.device("cpu")

    @property
    def dtype(self):
        return self.weight.dtype

    def decode(self, z):
        limit = 10.0 if self.dtype == torch.float32 else 1.0
        out = torch.where(z.abs() > limit, torch.inf, z)
        return type("Output", (), {"sample": out})()


def test_a_decode_that_overflows_is_done_again_in_float32_and_never_clamped_to_a_colour():
    vae = Overflowing().bfloat16()
    latents = torch.tensor([0.5, 2.0, 20.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    half, retried, lost = images.decode(vae, latents)
    assert half.unique().tolist() == [0.75] and retried.unique().tolist() == [1.0]  # 2 is beyond white
    assert torch.isnan(lost).all() and vae.dtype == torch.bfloat16


def test_a_map_without_contrast_is_said_and_recorded(photo, tmp_path, tiny_family, monkeypatch):
    monkeypatch.setattr(VisionTower, "patches", lambda self, image: torch.ones(8, 8, 4))
    made = stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "flat", "thing", family=tiny_family)
    recorded = Subject.open(made.subject).manifest.references[0].mask.result["warnings"]
    assert any("positive point has no contrast" in w for w in made.warnings) and list(made.warnings) == recorded


def test_features_that_are_not_finite_make_no_mask(photo, tmp_path, tiny_family, monkeypatch):
    monkeypatch.setattr(VisionTower, "patches", lambda self, image: torch.full((8, 8, 4), torch.nan))
    with pytest.raises(P3SError, match="not finite; try --dtype float32"):
        stages.mask(photo, [(18, 32)], [(46, 32)], tmp_path / "flat", "thing", family=tiny_family)
    assert not (tmp_path / "flat").exists()
