"""Recording what a device is to do, so that a replay costs one call: CUDA graphs, and a fake.

While a recording is on, nothing is computed: results are garbage until :meth:`Recording.replay`.
Python runs once, at the recording; a replay repeats the device's work, on the same memory.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recording(Protocol):
    """Work that can be repeated."""

    def replay(self) -> None:
        """Queues it again, on the current stream."""


class Recorder(Protocol):
    """Makes recordings that follow each other and share their memory: to be replayed in order."""

    def session(self) -> AbstractContextManager[None]:
        """Around all recordings that belong together, and what is computed between them."""

    def begin(self) -> None:
        """From now on work is recorded instead of done."""

    def end(self) -> Recording:
        """The work since :meth:`begin`."""

    def abandon(self) -> None:
        """Ends a recording that failed; nothing happens if none is on."""

    def launch(self, call: Callable[[], None]) -> None:
        """Does, or records, kernels that are not torch's own."""


class CudaRecorder:
    """By CUDA graphs in one memory pool, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """On the recorder's stream, which others wait for at the end."""
        before = torch.cuda.current_stream(self._device)
        # Capturing needs memory; what torch keeps for nobody may be all there is.
        torch.cuda.synchronize(self._device)
        # What the collector finds while a recording is on could be memory of CUDA's.
        gc.collect()
        torch.cuda.empty_cache()
        self._stream.wait_stream(before)
        collects = gc.isenabled()
        gc.disable()
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self.abandon()
                if collects:
                    gc.enable()
        before.wait_stream(self._stream)

    def begin(self) -> None:
        """Captures this thread's work only: others of this process may use CUDA meanwhile."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Recording:
        """The graph."""
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph

    def abandon(self) -> None:
        """Gets the stream out of capturing; the graph that comes of it is void."""
        graph, self._graph = self._graph, None
        if graph is not None:
            try:
                graph.capture_end()
            except RuntimeError:
                return  # It says what the failure said that brought us here.

    def launch(self, call: Callable[[], None]) -> None:
        """A launch on the capturing stream is captured, whoever makes it."""
        call()


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
        func: Any,  # noqa: ANN401 - an operator of torch's
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
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


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:  # noqa: ANN401
    """The tensors that an operator changes."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += _tensors(value)
    return found


def _tensors(value: Any) -> list[Tensor]:  # noqa: ANN401
    if isinstance(value, Tensor):
        return [value]
    return (
        [each for item in value for each in _tensors(item)]
        if isinstance(value, list | tuple)
        else []
    )


def _new(result: Any, written: list[Tensor]) -> list[Tensor]:  # noqa: ANN401
    return [each for each in _tensors(result) if not any(each is w for w in written)]


def _spoil(tensor: Tensor) -> None:
    """What memory holds before anything was computed into it."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        # What comes next is carried out for its shape, and zero is an index everywhere.
        tensor.zero_()
