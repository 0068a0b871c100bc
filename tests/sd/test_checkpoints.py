"""Checkpoints are whole or absent; the newest whole one counts; what is not finite is never one."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from p3s_cli import signals
from p3s_cli.errors import P3SError
from p3s_cli.sd import checkpoints
from p3s_cli.sd.train import Checkpoint, Recipe, train


def keep(folder, step):
    checkpoints.commit(folder, step, {"x": torch.full((4,), float(step))}, {"step": step})


def test_a_new_one_is_kept_before_the_old_one_goes(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    keep(tmp_path, 3)
    keep(tmp_path, 12)
    tensors, metadata = checkpoints.newest(tmp_path)
    assert metadata["step"] == 12 and tensors["x"].tolist() == [12.0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000012"]


def test_bytes_are_on_the_disk_before_a_name_is_and_the_old_one_goes_last(tmp_path, monkeypatch):
    """The order of what is asked of the system: flush what was written, rename it, flush the name, then prune."""
    keep(tmp_path, 3)
    done = []

    def heard(where, name, of):
        plain = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, **k: (done.append((name, Path(of(a)).name)), plain(*a, **k))[1])

    heard(os, "fsync", lambda a: os.readlink(f"/proc/self/fd/{a[0]}"))
    heard(os, "replace", lambda a: a[1])
    heard(os, "rename", lambda a: a[1])
    heard(shutil, "rmtree", lambda a: a[0])
    keep(tmp_path, 12)
    monkeypatch.undo()
    new = "step-00000012"
    for name in ("state.safetensors", "manifest.json"):
        assert done.index(("fsync", name)) < done.index(("replace", name)) < done.index(("rename", new))
    assert done.index(("replace", "state.safetensors")) < done.index(("fsync", new)) < done.index(("rename", new))
    assert done.index(("rename", new)) < done.index(("fsync", tmp_path.name)) < done.index(("rmtree", "step-00000003"))


def test_one_that_cannot_be_written_costs_no_other(tmp_path, monkeypatch):
    keep(tmp_path, 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(P3SError, match="step-00000012.*No space left"):
        keep(tmp_path, 12)
    assert checkpoints.newest(tmp_path)[1]["step"] == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "gone"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, damage):
    keep(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "saved")
    keep(tmp_path, 12)
    (tmp_path / "saved").rename(tmp_path / "step-00000003")
    state = tmp_path / "step-00000012" / "state.safetensors"
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    state.write_bytes(content[:-4] if damage == "cut" else content)
    if damage == "manifest":
        (state.parent / "manifest.json").write_text("[]")
    if damage == "gone":
        state.unlink()
    assert checkpoints.newest(tmp_path)[1]["step"] == 3
    assert not state.parent.exists()


def noisy(stop_at=None, number=signal.SIGTERM):
    """w follows noise; at step `stop_at` the process asks itself to end."""
    w = torch.nn.Parameter(torch.zeros(5))

    def loss(step, generator):
        if step == stop_at:
            os.kill(os.getpid(), number)
        return (w - torch.randn(5, generator=generator)).square().sum(), {}

    return {"w": w}, loss


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_its_step_with_a_checkpoint(tmp_path, number):
    recipe = Recipe(steps=12, lr=0.1)
    heard = []
    whole = train(*noisy(), recipe, on_step=lambda step, total, numbers: heard.append(numbers))
    with pytest.raises(signals.Interrupted) as stop, signals.raising():
        train(*noisy(stop_at=4, number=number), recipe, checkpoint=Checkpoint(tmp_path))
    assert stop.value.exit_code == 128 + number
    assert checkpoints.newest(tmp_path)[1]["step"] == 5
    again = []
    resumed = train(*noisy(), recipe, lambda step, total, numbers: again.append(numbers), Checkpoint(tmp_path))
    assert torch.equal(whole["w"], resumed["w"])
    assert again == heard[4:]  # what is reported goes on as if nothing had happened, from where it stopped


def test_a_checkpoint_is_due_by_time_and_not_by_steps(tmp_path, monkeypatch):
    """A clock that a step moves by 40 s, and 100 s between checkpoints: one after every third step, and the end's."""
    clock, kept = [0.0], []
    monkeypatch.setattr("p3s_cli.sd.train.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("p3s_cli.sd.train.checkpoints.commit", lambda folder, step, *_: kept.append(step))

    def slow(step, generator):
        clock[0] += 40.0
        return noisy_loss(step, generator)

    parameters, noisy_loss = noisy()
    train(parameters, slow, Recipe(steps=8, lr=0.1), checkpoint=Checkpoint(tmp_path, every=100.0))
    assert kept == [3, 6, 8]


def test_a_second_signal_does_not_wait(tmp_path):
    def impatient(step, generator):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal came too late")

    with pytest.raises(signals.Interrupted), signals.raising():
        train(noisy()[0], impatient, Recipe(steps=3, lr=0.1), checkpoint=Checkpoint(tmp_path))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    parameters, loss = noisy()

    def breaks(step, generator):
        if step == 6:
            parameters["w"].data.fill_(float("inf"))
        return loss(step, generator)

    with pytest.raises(P3SError, match="not finite any more"):
        train(parameters, breaks, Recipe(steps=7, lr=0.1), checkpoint=Checkpoint(tmp_path, every=0.0))
    tensors, metadata = checkpoints.newest(tmp_path)
    assert metadata["step"] == 6 and all(torch.isfinite(t).all() for t in tensors.values())


def test_skipped_steps_are_counted_across_a_resume(tmp_path):
    parameters, loss = noisy()

    def sometimes(step, generator):
        value, log = loss(step, generator)
        return (value * float("nan") if step in (1, 5) else value), log

    counts = []
    for until in (3, None):
        train(
            parameters,
            sometimes,
            Recipe(steps=8, lr=0.1),
            lambda s, t, n: counts.append(n["skipped"]),
            Checkpoint(tmp_path),
            until,
        )
    assert counts[-1] == 2
