"""Which executor serves a worker."""

from collections.abc import Callable
from typing import Any

from expertd_inference.execution import check
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.layers import CannotBatchError, watch_layers
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.room import Room
from expertd_inference.execution.turns import TurnsExecutor


def choose_executor(worker: Any, room: Room) -> Executor:  # noqa: ANN401 - a Worker
    """The best one that computes what the worker's model does, which is tried here."""
    return choose_for(worker.model, room, worker.session.say)


def choose_for(
    model: Any,  # noqa: ANN401 - transformers is untyped
    room: Room,
    say: Callable[[str], None],
) -> Executor:
    """As :func:`choose_executor`; ``say`` is told if sequences are computed in turns, and why."""
    try:
        return _batched(model, room)
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
