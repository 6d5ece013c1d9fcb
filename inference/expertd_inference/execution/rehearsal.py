"""One token by a model's modules and by its program: both must give the same bits.

What is compared are the logits, what was appended to keys and values, and what each layer gave to
its experts; the experts themselves are computed once. Whoever reads a model's modules may overlook
an operation that changes nothing yet (a clamp, say), so torch's operations are looked at, too:
outside of what the program calls as it is, there may be none that it has no counterpart for.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from expertd_inference.execution.decode_program import DecodeProgram
from expertd_inference.execution.known_parts import UnknownPartError
from expertd_inference.experts.call import ExpertsCall, ExpertsRunner, has_seat, seat_of
from expertd_inference.kernels.wave import Routed

_KNOWN_OPERATIONS = frozenset(
    {
        # Memory, and other views of it.
        *("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "clone", "copy_"),
        *("view", "_unsafe_view", "reshape", "transpose", "t", "slice", "select", "narrow"),
        *("unsqueeze", "squeeze", "expand", "alias", "detach", "_to_copy", "as_strided"),
        # Positions and their angles, which the model's own module computes for the program, too.
        *("arange", "cos", "sin", "bmm", "cat"),
        # The rotation, while torch's operations are looked at; and sums. A product with a number
        # that is not 1 shows in the result.
        *("add", "mul", "neg"),
        # The embedding; the head, where it is not native, which the program calls.
        *("embedding", "mm", "linear"),
    }
)

MODULES_CHANGE = threading.RLock()
"""Held while a model's modules are watched, and by whoever reads how they are: a program that is
made meanwhile, in another thread, would take what watches them for a user's hook."""


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Notes torch's operations outside of the parts that the program calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.names: set[str] = set()
        self.inside = 0
        self._thread = threading.get_ident()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operation of torch
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        # Masks and positions are not: whether attention had a mask shows in the result.
        floating = any(isinstance(x, Tensor) and x.is_floating_point() for x in made)
        if floating and not self.inside:
            self.names.add(func.overloadpacket.__name__)
        return result

    @contextmanager
    def outside(self, modules: list[nn.Module]) -> Iterator[None]:
        """While these run nothing is noted."""

        def enter(*_: object) -> None:
            self.inside += threading.get_ident() == self._thread

        def leave(*_: object) -> None:
            self.inside -= threading.get_ident() == self._thread

        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Runner:
    """In the place of a layer's runner: notes what it is asked and answers, then answers again."""

    def __init__(self, runner: ExpertsRunner) -> None:
        self._runner = runner
        self._thread = threading.get_ident()
        self._noted: tuple[Routed, Tensor] | None = None
        self.differs = False

    def run(self, call: ExpertsCall, /) -> Tensor:
        if threading.get_ident() != self._thread:
            return self._runner.run(call)
        if self._noted is None:
            self._noted = call.routed, self._runner.run(call)
            return self._noted[1]
        theirs, result = self._noted
        for name in ("rows", "index", "weights"):
            self.differs |= not _same(getattr(call.routed, name), getattr(theirs, name))
        return result

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        return self._runner.prepare(call)


def rehearse(
    model: Any,  # noqa: ANN401 - transformers is untyped
    forward: Callable[[], Tensor],
    program: DecodeProgram,
    token: int,
) -> tuple[Tensor, bool]:
    """The logits [1, vocabulary] by ``forward``, and whether the program gives the same bits.

    ``forward`` computes ``token`` by the modules; keys and values are afterwards what it made.
    Raises what it raises.
    """
    position = program.tokens
    seats = [seat_of(module) for module in model.modules() if has_seat(module)]
    operations = _Operations()
    with MODULES_CHANGE:
        originals = [seat.runner for seat in seats]
        runners = [_Runner(original) for original in originals]
        for seat, runner in zip(seats, runners, strict=True):
            seat.runner = runner
        try:
            with operations.outside([layer.mlp for layer in model.model.layers]), operations:
                logits = forward()
            appended = [part.clone() for part in program.appended(position)]
            try:
                ours = program.step(token)
            except UnknownPartError:
                ours = None
        finally:
            for seat, original in zip(seats, originals, strict=True):
                seat.runner = original
    same = (
        operations.names <= _KNOWN_OPERATIONS
        and not any(runner.differs for runner in runners)
        and ours is not None
        and _same(logits, ours)
        and all(map(_same, appended, program.appended(position)))
    )
    if not same:
        for there, theirs in zip(program.appended(position), appended, strict=True):
            there.copy_(theirs)
    return logits, same


def _same(ours: Any, theirs: Any) -> bool:  # noqa: ANN401 - tensors
    """Bit for bit, NaN included."""
    return (
        ours.dtype == theirs.dtype
        and ours.numel() == theirs.numel()
        and torch.equal(
            ours.contiguous().view(-1).view(torch.uint8),
            theirs.contiguous().view(-1).view(torch.uint8),
        )
    )
