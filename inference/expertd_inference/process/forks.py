"""Models in a forked process: they refuse at once.

A session does not survive a fork, and neither do the threads of torch's parallel operations: the
first of them would wait for ever. So no operation of a model may begin there.
"""

import os
import weakref
from typing import Any, NoReturn

from expertstore.errors import PreconditionError

_live: "weakref.WeakSet[Any]" = weakref.WeakSet()


def refuse_in_forks(model: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """From now on ``model`` and its parts raise PreconditionError in a fork of this process."""
    _live.add(model)


def _refuse_all() -> None:
    parent = os.getppid()

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PreconditionError(
            f"This model was loaded by process {parent}, of which this one is a fork; start "
            "workers with multiprocessing's spawn method, and load the model in each."
        )

    for model in list(_live):
        model.__dict__["generate"] = refuse
        for module in model.modules():
            module.__dict__["forward"] = refuse


os.register_at_fork(after_in_child=_refuse_all)
