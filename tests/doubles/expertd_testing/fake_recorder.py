"""Recordings without CUDA graphs: torch's operations on the CPU, noted and done again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertd_inference.device.recorder import Recording


class FakeRecorder:
    """On the CPU: torch's operations are noted, and done again one by one.

    Faithful where it matters: while recording, results are garbage and nothing that exists is
    changed; what a graph could not have (reading a value, a result whose size depends on values,
    data from the host) is refused with torch's own sentence.
    """

    def __init__(self) -> None:
        self._mode: _Noting | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Nothing to prepare."""
        try:
            yield
        finally:
            self.abandon()

    def begin(self) -> None:
        """Notes from now on."""
        assert self._mode is None
        self._mode = _Noting()
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> Recording:
        """What was noted."""
        mode, self._mode = self._mode, None
        assert mode is not None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return _Notes(mode.steps)

    def abandon(self) -> None:
        """Forgets it."""
        if self._mode is not None:
            self.end()

    def launch(self, call: Callable[[], None]) -> None:
        """Noted as one step."""
        if self._mode is None:
            call()
        else:
            self._mode.steps.append(call)


_FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "lift_fresh",
    "repeat_interleave.Tensor",
)


class _Notes:
    def __init__(self, steps: list[Callable[[], None]]) -> None:
        self._steps = steps

    def replay(self) -> None:
        for step in self._steps:
            step()


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls with the tensors that they took and gave, which it keeps alive as a pool would."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name.startswith(_FORBIDDEN):
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing (aten::{name})"
            )
        written = _written(func, args, kwargs)
        kept = [tensor.clone() for tensor in written]
        result = func(*args, **kwargs)
        for tensor, value in zip(written, kept, strict=True):
            tensor.copy_(value)
        given = [each for each in _tensors(result) if not any(each is w for w in written)]
        if not func.is_view:
            for tensor in given:
                _spoil(tensor)

        def again() -> None:
            for there, value in zip(given, _new(func(*args, **kwargs), written), strict=True):
                if value.data_ptr() != there.data_ptr():
                    there.copy_(value)

        self.steps.append(again)
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += _tensors(value)
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return (
        [each for item in value for each in _tensors(item)]
        if isinstance(value, list | tuple)
        else []
    )


def _new(result: Any, written: list[Tensor]) -> list[Tensor]:
    return [each for each in _tensors(result) if not any(each is w for w in written)]


def _spoil(tensor: Tensor) -> None:
    """What memory holds before anything was computed into it."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        # What comes next is carried out for its shape, and zero is an index everywhere.
        tensor.zero_()
