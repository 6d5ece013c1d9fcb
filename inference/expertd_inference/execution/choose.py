"""Which executor serves a worker."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from expertd_inference.execution import check
from expertd_inference.execution.exact import make_exact
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.layers import CannotBatchError, watch_layers
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.parts import UnknownPartError
from expertd_inference.execution.program import ProgramExecutor, make_program
from expertd_inference.execution.room import Room
from expertd_inference.execution.sighted import SightedExecutor
from expertd_inference.execution.turns import TurnsExecutor
from expertd_inference.experts.call import has_seat, seat_of
from expertd_inference.experts.cpu import experts_modules
from expertd_inference.kernels.cpu.library import EXACT
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.language import LanguageModel


def choose_executor(worker: Any, room: Room) -> Executor:  # noqa: ANN401 - a Worker
    """The best one that computes what the worker's model does, which is tried here."""
    exact = getattr(worker, "exact", False)
    kernels = worker.kernels if isinstance(worker.kernels, NativeKernels) else None
    if worker.device_stats is not None:
        kernels = None
    say = worker.session.say
    executor = choose_for(worker.language, room, say, exact=exact, kernels=kernels)
    if exact and kernels is not None and (slow := _row_by_row(worker.language, kernels)):
        executor.reason += f"; {slow}"
        say(f"{slow}; without --exact it is faster.")
    return executor


def choose_for(
    model: Any,  # noqa: ANN401 - transformers is untyped
    room: Room,
    say: Callable[[str], None],
    *,
    exact: bool = False,
    kernels: NativeKernels | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Executor:
    """As :func:`choose_executor`; ``say`` is told if sequences are computed in turns, and why.

    With ``exact`` the bits of a sequence's logits do not depend on what else is computed. A program
    is tried with ``kernels``: those that the CPU computes all of the model with. All of a step is
    computed within ``around``, at whose end it may turn out to be lost.
    """
    why = ""
    if kernels is not None:
        flags = kernels.flags | (EXACT if exact else 0)
        try:
            program = make_program(model, room.num_blocks, room.num_rows, flags)
        except UnknownPartError as error:
            why = f"; no program, as {error}"
        else:
            if not isinstance(model, LanguageModel):
                return program
            return SightedExecutor(program, _of_images(model, program, room, exact=exact))
    if exact:
        make_exact(model)
    try:
        executor = _batched(model, room, say, around, exact=exact)
        executor.reason += why
        return executor
    except CannotBatchError as error:
        say(f"{type(model).__name__} computes one sequence after the other: {error}")
        return TurnsExecutor(model, str(error), around)


def _of_images(
    model: Any,  # noqa: ANN401
    program: ProgramExecutor,
    room: Room,
    *,
    exact: bool,
) -> ModulesExecutor:
    """What computes rows of images, with the program's keys and values."""
    if exact:
        make_exact(model)
    with check.without_experts(model):
        layers = watch_layers(model)
    alone = "bits count" if exact else ""
    return ModulesExecutor(model, layers, room, alone=alone, memory=program.memory)


def _row_by_row(model: Any, kernels: NativeKernels) -> str:  # noqa: ANN401
    """Which experts torch computes a row at a time, that bits not depend on rows; empty if none."""
    seats = [seat_of(module) for module in experts_modules(model).values() if has_seat(module)]
    unknown = sum(not kernels.knows(seat.spec, model.dtype) for seat in seats)
    if not unknown:
        return ""
    return (
        f"to be exact torch computes the experts of {unknown} layers one row at a time, as native "
        "kernels do not know their activation or dtype"
    )


def _batched(
    model: Any,  # noqa: ANN401
    room: Room,
    say: Callable[[str], None],
    around: Callable[[], AbstractContextManager[None]],
    *,
    exact: bool,
) -> Executor:
    """Raises CannotBatchError."""
    with check.without_experts(model):
        layers = watch_layers(model)
    small = Room(check.NUM_SEQUENCES, check.NUM_SEQUENCES, check.NUM_ROWS)
    found = ""
    for continues in (True, False) if layers.states else (True,):
        tried = ModulesExecutor(model, layers, small, continues=continues)
        try:
            check.check(tried, model)
            alone = exact and _why_alone(tried, model)
        except check.MismatchError as error:
            found = str(error)
            continue
        finally:
            tried.close()
        if alone and layers.turning_point is not None:
            raise CannotBatchError(alone)
        if alone:
            say(f"{type(model).__name__} computes one sequence at a time to be exact: {alone}")
        return ModulesExecutor(
            model, layers, room, continues=continues, alone=alone or "", around=around
        )
    raise CannotBatchError(f"rows packed together gave something else, {found}")


def _why_alone(executor: Executor, model: Any) -> str:  # noqa: ANN401
    """Why sequences cannot share a step if bits count; empty if they can."""
    try:
        check.check_exact(executor, model)
    except check.MismatchError as error:
        return str(error)
    return ""
