"""`auto`, what is not there, and what torch would take for a device and p3s does not know."""

import contextlib

import pytest
import torch

from p3s_cli.errors import InputError
from p3s_cli.sd.devices import resolve_device, resolve_dtype
from p3s_cli.sd.family import load


def test_unknown_device_and_dtype():
    with pytest.raises(InputError, match="auto, cuda, mps, cpu"):
        resolve_device("tpu")
    with pytest.raises(InputError, match="dtype"):
        load("world", dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda device"):
            load("world", device="cuda")


@pytest.mark.parametrize("name", ["cpu:abc", "cpu:", "cuda:x", "cuda:-1", "xpu", "xpu:0", "", ":", "cpu:0:0"])
def test_what_torch_takes_for_no_device_or_p3s_does_not_know_is_refused(name):
    with pytest.raises(InputError, match=f"no device is called '{name}'"):
        resolve_device(name)


def test_a_device_is_one_of_those_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(n) for n in ("auto", "cuda", "cuda:1", "cpu", "cpu:0")] == [
        "cuda", "cuda", "cuda:1", "cpu", "cpu:0",
    ]  # fmt: skip
    for name in ("cuda:2", "cuda:7", "cpu:1"):
        with pytest.raises(InputError, match=f"this machine has no {name} device"):
            resolve_device(name)


def test_the_precision_left_open_is_one_that_the_card_computes_in(monkeypatch):
    """Before Ampere bfloat16 is emulated, with no fused attention."""
    monkeypatch.setattr(torch.cuda, "device", lambda which: contextlib.nullcontext())
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n)
        assert resolve_dtype("auto", "cuda:1") == dtype and resolve_dtype("float32", "cuda") == torch.float32
    assert resolve_dtype("auto", "cpu") == resolve_dtype("auto", "mps") == torch.float32
