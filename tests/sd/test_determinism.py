"""What `--deterministic` switches, that it is put back, and what is said where torch cannot."""

import os

import pytest
import torch

from p3s_cli.errors import P3SError
from p3s_cli.sd.determinism import exact

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(CUBLAS),
    )


@pytest.fixture(params=["as torch starts", "as someone has set it"])
def before(request, monkeypatch):
    """The switches as they are found: torch's own, and all of them the other way."""
    kept = switches()
    monkeypatch.delenv(CUBLAS, raising=False)
    if request.param == "as someone has set it":
        monkeypatch.setenv(CUBLAS, ":16:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
    yield switches()
    torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
    torch.backends.cudnn.benchmark = kept[2]
    torch.utils.deterministic.fill_uninitialized_memory = kept[3]


def test_all_switches_are_set_inside_and_as_found_afterwards(before):
    with exact(True):
        assert switches() == (True, False, False, False, ":4096:8")
    assert switches() == before
    with pytest.raises(ValueError), exact(True):
        raise ValueError
    assert switches() == before
    with exact(False):
        assert switches() == before


def test_an_operation_that_cannot_repeat_is_one_sentence_and_not_a_result():
    """`put_` is such a one on the CPU too: of two values for one place, either may come last."""
    numbers, place = torch.zeros(3), torch.tensor([0, 0])
    with pytest.raises(P3SError, match="put_ does not have a deterministic implementation.*leave out --deterministic"):
        with exact(True):
            numbers.put_(place, torch.ones(2))
    with pytest.raises(RuntimeError, match="shape"), exact(True):
        torch.ones(2) @ torch.ones(3, 3)
    with exact(False):
        numbers.put_(place, torch.ones(2))


def test_cublas_used_before_without_its_workspace_is_one_sentence():
    with pytest.raises(P3SError, match=f"start a new one, or set {CUBLAS}=:4096:8"), exact(True):
        raise RuntimeError(f"not deterministic because it uses CuBLAS ... {CUBLAS}=:4096:8 or {CUBLAS}=:16:8.")
