"""P3S's passes and its training step as CUDA graphs: thousands of small launches recorded once and then sent as one.

A fast card is done with a kernel sooner than Python can launch the next one, and every step launches the same ones with
the same shapes. What a graph reads lies at fixed addresses, so it is copied there before each replay; nothing in it
may wait for the card or depend on a number read from it. A recording counts once its replays have given what the work itself
gives; where one does not, or a card will not have it, all goes on without, and the log says so.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from p3s_cli.methods import nested

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
        _copy(self._given, given)
        self._replay()
        return self._results

    def proved(self, given: Sequence[Tensor]) -> R:
        """The results of the work itself. Raises Untrue where a replay's are others, not finite, or slower to have.

        They lie in memory that was free after the recording, and so tell as well of a replay that writes where it should not.
        """
        _copy(self._given, given)
        truth, eager = _timed(self._work)
        _spoil(self._written)  # or a replay that leaves it out would live on what the work has written
        _, replay = _timed(self._replay)
        pairs = zip(self._parts(self._results), self._parts(truth), strict=True)
        if apart := [d for d in (_apart(found, true) for found, true in pairs) if not d <= _TOLERANCE]:
            raise Untrue(f"a replay gave other numbers than its work, apart by {apart[0]:.2g} of their norm")
        if self.proofs and replay > _SLOWER * eager:  # the first one has the graph to bring to the card
            raise Untrue(f"a replay took {replay * 1e3:.0f} ms, its work {eager * 1e3:.0f}")
        self.proofs += 1
        return truth


class Graphed:
    """A function of tensors, recorded once for each shape of its arguments. For use without gradients.

    Arguments and results may hold tensors in dataclasses, dicts, lists and tuples; whatever else is in them is part of the
    shape, models by who they are. Results are the caller's own: the function's while a recording proves itself, in its
    first calls, and then a replay's.
    """

    def __init__(self, function: Callable[..., Any], record: Record = record):
        self._function, self._record = function, record
        self._recorded: dict[Hashable, Recording] = {}
        self._refused = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._refused:
            try:
                return self._graphed(arguments, options)
            except RuntimeError as error:
                self._refused, self._recorded = True, {}
                _told(error)
        return self._function(*arguments, **options)

    def _graphed(self, arguments: tuple, options: dict) -> Any:
        given: list[Tensor] = []
        shape = nested.shape((arguments, options), given)
        recording = self._recorded.get(shape)
        if recording is None:
            fixed = [t.clone() for t in given]
            arguments, options = nested.filled((arguments, options), iter(fixed))
            function = self._function
            work = lambda: function(*arguments, **options)  # noqa: E731
            recording = self._recorded[shape] = Recording(work, fixed, _one_by_one, self._record)
        proving = recording.proofs < PROOFS
        results = recording.proved(given) if proving else recording.replayed(given)
        return nested.filled(results, iter([t.clone() for t in nested.tensors(results)]))


class Stepwise(Protocol):
    """A loss in two halves: `draw`, all that is random, a dataclass of tensors on the device; and `compute`, all else.

    `compute` (drawn, model) gives the value and named numbers, 0-d tensors. `judge` (drawn) is the same as a loss of
    `sd.train` gives it, in its own precision.
    """

    def draw(self, generator: torch.Generator) -> Any: ...

    def compute(self, drawn: Any, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]: ...

    def judge(self, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclasses.dataclass
class _Step:
    """What a recorded step leaves behind: value and named numbers, gradients in the masters' precision, the value and
    the gradients' norm (2,)."""

    value: Tensor
    numbers: dict[str, Tensor]
    gradients: list[Tensor | None]
    size: Tensor

    def parts(self) -> list[list[Tensor]]:
        return [[self.value], [g for g in self.gradients if g is not None]]


class CapturedLoss:
    """A loss for `sd.train` whose computation, backward pass included, is one graph.

    It is computed with a copy of `model` in `dtype`, which follows `model` at every step and is what sampling will use,
    so that half precision needs no casts one by one; the gradients end in float32 at `model`'s own parameters.

    The first step is eager, and the recording made at the second, when all that a run keeps has its place in memory. It
    is proved on the draws of both before it counts; a step that is not finite is made again by `judge`.
    """

    def __init__(self, loss: Stepwise, model: nn.Module, dtype: torch.dtype, record: Record = record):
        self._loss, self._model, self._dtype, self._record = loss, model, dtype, record
        self._recording: Recording[_Step] | None = None
        self._earlier: Any = None
        self._refused = False

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = self._loss.draw(generator)
        if self._recording is None and self._earlier is not None and not self._refused:
            try:
                self._recording = self._begun([self._earlier, drawn])
            except RuntimeError as error:
                self._drop(error)
        self._earlier = drawn
        if self._recording is None:
            return self._loss.judge(drawn)
        made = self._recording.replayed(nested.tensors(drawn))
        if not all(map(math.isfinite, made.size.tolist())):  # the loop waits for it right after, anyway
            return self._doubted(drawn)
        return self._given(made.value, made.numbers, made.gradients)

    def _begun(self, draws: Sequence[Any]) -> Recording[_Step]:
        """A recording that holds on these draws. Raises RuntimeError."""
        masters = list(self._model.parameters())
        working = copy.deepcopy(self._model).to(self._dtype)
        weights = list(working.parameters())
        fixed = [t.clone() for t in nested.tensors(draws[0])]
        drawn, compute = nested.filled(draws[0], iter(fixed)), self._loss.compute

        def work() -> _Step:
            with torch.no_grad():
                _copy(weights, masters)
            value, numbers = compute(drawn, working)
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
            wide = [None if g is None else torch.empty_like(m) for g, m in zip(gradients, masters, strict=True)]
            there = [w for w in wide if w is not None]
            _copy(there, [g for g in gradients if g is not None])
            value = value.detach()
            return _Step(value, numbers, wide, torch.stack([value.float(), nn.utils.get_total_norm(there).float()]))

        recording = Recording(work, fixed, _Step.parts, self._record, weights)
        for one in draws:
            recording.proved(nested.tensors(one))
        return recording

    def _doubted(self, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The eager step in the place of a recorded one that is not finite, and of all that follow if it is finite itself."""
        value, numbers = self._loss.judge(drawn)
        gradients = torch.autograd.grad(value, list(self._model.parameters()), allow_unused=True)
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        if math.isfinite(value.item()) and math.isfinite(norm.item()):
            self._drop(Untrue("a replay was not finite where its work is"))
        return self._given(value.detach(), numbers, gradients)

    def _given(
        self, value: Tensor, numbers: dict[str, Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        for parameter, gradient in zip(self._model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # the loop lets go of it after each step
        return value, numbers

    def _drop(self, error: RuntimeError) -> None:
        self._recording, self._refused = None, True
        _told(error)


def _told(error: RuntimeError) -> None:
    """The first line of the error; where a recording broke off, of the one that broke it as well, and all of both for a debugger."""
    causes = [e for e in (error, error.__context__) if e is not None]
    _log.warning("no CUDA graph here, going on without: %s", ", after: ".join(str(e).split("\n")[0] for e in causes))
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


def _one_by_one(results: Any) -> list[list[Tensor]]:
    return [[t] for t in nested.tensors(results)]


@torch.no_grad()
def _apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """How far these are apart, taken as one vector, in units of its norm; infinity or not a number where either is not finite."""
    apart = [torch.linalg.vector_norm(a.float() - b.float()) for a, b in zip(found, truth, strict=True)]
    size = [torch.linalg.vector_norm(b.float()) for b in truth]
    apart, size = (torch.linalg.vector_norm(torch.stack(norms)).item() for norms in (apart, size))
    if not math.isfinite(size):
        return math.nan
    return apart / size if size else math.inf if apart else 0.0


def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_(list(into), list(source))


@torch.no_grad()
def _spoil(tensors: Sequence[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(list(tensors))
