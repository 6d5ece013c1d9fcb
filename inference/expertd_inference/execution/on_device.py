"""Which executor serves a model whose experts are computed on devices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from expertd_inference.device.group import DeviceGroup
from expertd_inference.execution import check
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.graphs import GraphsExecutor
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.room import Room


def device_executor(
    model: Any,  # noqa: ANN401 - transformers is untyped
    group: DeviceGroup,
    room: Room,
    longest_tokens: int,
    say: Callable[[str], None],
    *,
    exact: bool = False,
) -> Executor:
    """The best one that computes what ``model``, connected to ``group``, does; it is tried here.

    No text has more than ``longest_tokens``. ``say`` is told what is not possible. With ``exact``
    the bits of a sequence's logits do not depend on what else is computed; no step is recorded.
    """
    around = group.transaction.forward_pass
    executor = choose_for(model, _with_scratch(room), say, exact=exact, around=around)
    if (
        not group.records
        or not isinstance(executor, ModulesExecutor)
        or executor.recurrent
        or executor.turning_point is not None
    ):
        return executor
    try:
        _check(model, group, executor)
        return GraphsExecutor(model, executor, group, room, longest_tokens)
    except check.MismatchError as error:
        say(f"recorded steps of this model gave something else, {error}; its modules serve.")
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        say(
            "this model's steps cannot be recorded as CUDA graphs "
            f"({str(error).splitlines()[0]}); its modules serve."
        )
    return executor


def _check(model: Any, group: DeviceGroup, executor: ModulesExecutor) -> None:  # noqa: ANN401
    """Tries recorded steps. Raises MismatchError, and RuntimeError if there can be none."""
    small = Room(check.NUM_SEQUENCES, check.NUM_SEQUENCES, check.NUM_ROWS)
    modules = executor.with_room(_with_scratch(small))
    try:
        # The experts are not asked, so they cannot be part of it.
        check.check(GraphsExecutor(model, modules, group, small, 1, segments=True), model)
    finally:
        modules.close()
        group.forget_trials()


def _with_scratch(room: Room) -> Room:
    """With a block for the rows that a recorded step lacks."""
    return replace(room, num_blocks=room.num_blocks + 1)
