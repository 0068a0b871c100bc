"""Work on a card as a CUDA graph: thousands of small launches recorded once and then sent as one.

A fast card is done with a kernel sooner than Python can launch the next one, and every step launches the same ones with
the same shapes. What a graph reads lies at fixed addresses, so it is copied there before each replay; nothing in it
may wait for the card or depend on a number read from it. A recording counts once its replays have given what the work itself
gives; where one does not, or a card will not have it, all goes on without, and the log says so:

    none -> proving    `record`, at the first call with these shapes (`captured.Graphed`) or the second (`CapturedLoss`)
    proving -> counts  `Recording.proved` on `PROOFS` inputs; until then the work's own results are given out
    any -> refused     a RuntimeError: the card's own, `Untrue` from a proof, or from `CapturedLoss` of a later replay that
                       is not finite where its work is; for good, and told once (`told`)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
# work without arguments -> what does it again, and its results, which are always these very tensors
Record = Callable[[Callable[[], R]], tuple[Callable[[], None], R]]

LEAST_STEPS = 10  # recording and proving costs about as much as five steps
PROOFS = 2  # inputs on which a replay has to give what the work gives before one counts
_TOLERANCE = 2e-2  # of a result's norm, between two runs of the same kernels in bfloat16
_SLOWER = 1.25  # a replay may take this much longer than the work itself: as long, but for noise
_log = logging.getLogger(__name__)


def possible(device: str, steps: int) -> bool:
    """Whether passes that come this often on this device are worth a recording."""
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return cuda and torch.device(device).index in (None, torch.cuda.current_device()) and steps >= LEAST_STEPS


def record(work: Callable[[], R]) -> tuple[Callable[[], None], R]:
    """A CUDA graph of `work`, which runs twice before, for what libraries set up at their first call."""
    own, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(own)
    with torch.cuda.stream(aside):
        for _ in range(2):
            work()
    own.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = work()
    except RuntimeError:
        torch.cuda.set_stream(own)  # a recording that breaks off leaves its own stream in this one's place
        torch.cuda.synchronize()
        raise
    return graph.replay, result


class Untrue(RuntimeError):
    """A replay is not what its work is."""


class Recording(Generic[R]):
    """Work on `given`, recorded, and all that the recording needs.

    `parts` groups the tensors of the results; each group is compared as one. `written` is what the work itself writes
    before it reads it. `work` must not hold whoever holds the recording: in a circle, the card's memory would be free only when
    Python next looks for circles.
    """

    def __init__(
        self,
        work: Callable[[], R],
        given: list[Tensor],
        parts: Callable[[R], list[list[Tensor]]],
        record: Record,
        written: Sequence[Tensor] = (),
    ):
        # held for as long as there are replays: a graph knows addresses and keeps nothing alive that lies there
        self._work, self._given, self._parts, self._written = work, given, parts, written
        self._replay, self._results = record(work)
        self.proofs = 0

    def replayed(self, given: Sequence[Tensor]) -> R:
        """The results for these inputs, until the next replay."""
        copy(self._given, given)
        self._replay()
        return self._results

    def proved(self, given: Sequence[Tensor]) -> R:
        """The results of the work itself. Raises Untrue where a replay's are others, not finite, or slower to have.

        They lie in memory that was free after the recording, and so tell as well of a replay that writes where it should not.
        How slow does not count where kernels have to repeat their bits: what is done must not hang on a clock then.
        """
        copy(self._given, given)
        truth, eager = _timed(self._work)
        spoil(self._written)  # or a replay that leaves it out would live on what the work has written
        _, replay = _timed(self._replay)
        pairs = zip(self._parts(self._results), self._parts(truth), strict=True)
        if apart := [d for d in (_apart(found, true) for found, true in pairs) if not d <= _TOLERANCE]:
            raise Untrue(f"a replay gave other numbers than its work, apart by {apart[0]:.2g} of their norm")
        # the first replay has the graph to bring to the card
        timed = self.proofs and not torch.are_deterministic_algorithms_enabled()
        if timed and replay > _SLOWER * eager:
            raise Untrue(f"a replay took {replay * 1e3:.0f} ms, its work {eager * 1e3:.0f}")
        self.proofs += 1
        return truth


def told(error: RuntimeError, of: str = "here") -> None:
    """That there is none `of` something, and why: the first line of the error; where a recording broke off, of the one that broke it as well, and all of both for a debugger."""
    causes = [e for e in (error, error.__context__) if e is not None]
    _log.warning("no CUDA graph %s, going on without: %s", of, ", after: ".join(str(e).split("\n")[0] for e in causes))
    _log.debug("where it came from", exc_info=error)


def _timed(work: Callable[[], R]) -> tuple[R, float]:
    """Results, and the seconds until the card has them."""
    started = _now()
    result = work()
    return result, _now() - started


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def _apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """How far these are apart, taken as one vector, in units of its norm; infinity or not a number where either is not finite."""
    apart = [torch.linalg.vector_norm(a.float() - b.float()) for a, b in zip(found, truth, strict=True)]
    size = [torch.linalg.vector_norm(b.float()) for b in truth]
    apart, size = (torch.linalg.vector_norm(torch.stack(norms)).item() for norms in (apart, size))
    if not math.isfinite(size):
        return math.nan
    return apart / size if size else math.inf if apart else 0.0


def copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_(list(into), list(source))


@torch.no_grad()
def spoil(tensors: Sequence[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(list(tensors))
