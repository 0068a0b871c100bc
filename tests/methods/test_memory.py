"""Counted memory at SD v1-5's shape against the figures of the design, and the choice of a profile."""

import pytest
import torch

from p3s_cli.config import MEMORY, MemoryProfile
from p3s_cli.errors import InputError, P3SError
from p3s_cli.methods import memory
from p3s_cli.methods.memory import within
from p3s_cli.sd import profile


@pytest.fixture(scope="module")
def sd15():
    return memory.Sizes.of(profile.find("sd15"))


def test_sizes_are_those_of_sd15(sd15):
    assert sd15.unet / 1e6 == pytest.approx(859.52, abs=0.01)
    # the copy, two sets of zero convolutions, and a little for gates and RNGR encoder
    assert sd15.control / 1e6 == pytest.approx(579.38 + 2 * 12.41, abs=0.2)
    # VAE 83.65, text encoder 123.06 twice (the CLIP pair has its own), vision tower 303.18
    assert sd15.encoders / 1e6 == pytest.approx(83.65 + 2 * 123.06 + 303.18, abs=0.05)


@pytest.mark.parametrize(
    ("name", "batch", "expected"), [("16", 1, 13.8), ("24", 4, 20.5), ("12", 1, 10.2), ("8", 1, 6.1)]
)
def test_training_in_bfloat16_takes_what_was_counted_for_each_profile(sd15, name, batch, expected):
    """13.8 GB at batch 1 and 18.1 at batch 4 with fp32 Adam, the average 4 bytes of 604 M more, 10.2 with 8-bit Adam, 6.1 in all-bfloat16; the
    CLIP pair's text tower, 0.25 GB, is counted here and was not there."""
    extra = 0 if MEMORY[name].offload else 0.25
    assert sd15.finetune(MEMORY[name], torch.bfloat16, batch) / 1e9 - extra == pytest.approx(expected, abs=0.15)


def test_each_profile_fits_the_card_it_is_named_after(sd15):
    for name, profile_ in MEMORY.items():
        assert max(sd15.finetune(profile_, torch.bfloat16), sd15.generate(profile_, torch.bfloat16)) < int(name) * 0.9e9


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [(141, "24"), (25.3, "24"), (23.6, "24"), (16.8, "16"), (12.5, "12"), (8.5, "8"), (4, "8")],
)
def test_a_card_gets_the_profile_named_after_it(monkeypatch, gigabytes, expected):
    monkeypatch.setattr(memory, "device_memory", lambda device: int(gigabytes * 1e9))
    assert memory.choose("auto", profile.find("sd15"), "cuda", torch.bfloat16)[0] == expected


@pytest.mark.parametrize(("gigabytes", "name", "fits"), [(25.3, "sd15", False), (42, "sd15", True), (4, "world", True)])
def test_a_recorded_step_needs_the_room_it_was_measured_to_take(monkeypatch, gigabytes, name, fits):
    """32.4 GB of SD v1-5's, so that a card of 24 GB is not asked for it and one of 40 GB is."""
    monkeypatch.setattr(memory, "device_memory", lambda device: int(gigabytes * 1e9))
    given = profile.find(name), MEMORY["24"], "cuda", torch.bfloat16
    assert memory.room_to_record(*given, batch=1) == fits


def test_a_small_family_gets_the_same_profile_on_every_machine(monkeypatch, world):
    for available in (3e9, 300e9, None):
        monkeypatch.setattr(memory, "device_memory", lambda device, a=available: a)
        assert memory.choose("auto", world.profile, "cpu", torch.float32)[0] == "24"
    assert memory.choose("12", world.profile, "cpu", torch.float32)[0] == "12"
    with pytest.raises(InputError, match="no memory profile is called '20'"):
        memory.choose("20", world.profile, "cpu", torch.float32)


def test_out_of_memory_is_tried_once_more_with_the_next_smaller_profile_and_said():
    tried = []

    def work(name: str, memory: MemoryProfile) -> str:
        tried.append(name)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    result, said = within("16", MEMORY["16"], work)
    assert (result, tried) == ("done", ["16", "12"]) and "16" in said and "12" in said


@pytest.mark.parametrize("words", ["MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_a_second_time_or_with_the_smallest_it_is_one_sentence(words):
    def work(name: str, memory: MemoryProfile):
        raise RuntimeError(words)

    with pytest.raises(P3SError, match="24 and then with 16"):
        within("24", MEMORY["24"], work)
    with pytest.raises(P3SError, match="smallest"):
        within("8", MEMORY["8"], work)


def test_mps_has_no_float8_and_is_given_no_profile_that_tunes_in_it(monkeypatch):
    """Not by itself, not by name, and not where it runs out of memory; the CPU beside it has float8, and drawing needs none."""
    monkeypatch.setattr(memory, "device_memory", lambda device: int(8e9))
    sd15 = profile.find("sd15")
    assert memory.choose("auto", sd15, "mps", torch.float32)[0] == "16"
    for name in ("12", "8"):
        with pytest.raises(InputError, match=f"profile {name} tunes in float8, which mps does not.*--memory 16"):
            memory.choose(name, sd15, "mps", torch.float32)
        assert memory.choose(name, sd15, "cpu", torch.float32)[0] == name
        assert memory.choose(name, sd15, "mps", torch.float32, tuning=False)[0] == name
    assert memory.choose("auto", sd15, "mps", torch.float32, tuning=False)[0] == "8"

    def work(name: str, memory: MemoryProfile):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)")

    with pytest.raises(P3SError, match="profile 16, which is the smallest here"):
        within("16", MEMORY["16"], work)
    with pytest.raises(P3SError, match="profile 16 and then with 12"):
        within("16", MEMORY["16"], work, tuning=False)


def test_what_heeds_no_profile_is_not_tried_again_under_another():
    calls = []

    def work(name: str, memory: MemoryProfile):
        calls.append(name)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(P3SError, match="no way with less"):
        within("24", MEMORY["24"], work, heeded=False)
    assert calls == ["24"]


def test_another_fault_is_not_taken_for_a_lack_of_memory():
    calls = []

    def work(name: str, memory: MemoryProfile):
        calls.append(name)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        within("24", MEMORY["24"], work)
    assert calls == ["24"]
