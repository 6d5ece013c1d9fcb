"""Recording what a device is to do, so that a replay costs one call: CUDA graphs.

While a recording is on, nothing is computed: results are garbage until :meth:`Recording.replay`.
Python runs once, at the recording; a replay repeats the device's work, on the same memory.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch


class Recording(Protocol):
    """Work that can be repeated."""

    def replay(self) -> None:
        """Queues it again, on the current stream."""


class GraphRecorder(Protocol):
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
                # It says what the failure said that brought us here.
                self._end_failed_capture()

    def launch(self, call: Callable[[], None]) -> None:
        """A launch on the capturing stream is captured, whoever makes it."""
        call()

    def _end_failed_capture(self) -> None:
        """Does what torch's ``capture_end`` leaves undone when it raises.

        torch's allocator would go on taking memory for the graph, and its generator of random
        numbers would think that they are recorded, for whoever draws some next.
        """
        # A lost device has neither.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        with suppress(RuntimeError), warnings.catch_warnings():
            # Nobody else ends the generator's recording but a capture that succeeds.
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            empty = torch.cuda.CUDAGraph()
            empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()
