"""Which executor serves a worker."""

from collections.abc import Callable
from typing import Any

from expertd_inference.execution import check
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.layers import CannotBatchError, watch_layers
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.parts import UnknownPartError
from expertd_inference.execution.program import make_program
from expertd_inference.execution.room import Room
from expertd_inference.execution.turns import TurnsExecutor
from expertd_inference.kernels.cpu.native import NativeKernels


def choose_executor(worker: Any, room: Room) -> Executor:  # noqa: ANN401 - a Worker
    """The best one that computes what the worker's model does, which is tried here."""
    kernels = worker.kernels if isinstance(worker.kernels, NativeKernels) else None
    on_cpu = worker.device_stats is None
    return choose_for(worker.model, room, worker.session.say, kernels=kernels if on_cpu else None)


def choose_for(
    model: Any,  # noqa: ANN401 - transformers is untyped
    room: Room,
    say: Callable[[str], None],
    *,
    kernels: NativeKernels | None = None,
) -> Executor:
    """As :func:`choose_executor`; ``say`` is told if sequences are computed in turns, and why.

    A program is tried with ``kernels``: those that the CPU computes all of the model with.
    """
    why = ""
    if kernels is not None:
        try:
            return make_program(model, room.num_blocks, room.num_rows, kernels.flags)
        except UnknownPartError as error:
            why = f"; no program, as {error}"
    try:
        executor = _batched(model, room)
        executor.reason += why
        return executor
    except CannotBatchError as error:
        say(f"{type(model).__name__} computes one sequence after the other: {error}")
        return TurnsExecutor(model, room, str(error))


def _batched(model: Any, room: Room) -> Executor:  # noqa: ANN401
    """Raises CannotBatchError."""
    with check.without_experts(model):
        layers = watch_layers(model)
    found = ""
    for continues in (True, False) if layers.states else (True,):
        small = Room(check.NUM_SEQUENCES, check.NUM_SEQUENCES, check.NUM_ROWS)
        tried = ModulesExecutor(model, layers, small, continues=continues)
        try:
            check.check(tried, model)
        except check.MismatchError as error:
            found = str(error)
        else:
            return ModulesExecutor(model, layers, room, continues=continues)
        finally:
            tried.close()
    raise CannotBatchError(f"rows packed together gave something else, {found}")
