"""A step of a model on devices: one forward pass, at whose end all that was held is given back.

A layer's results are passed on before it is known that the records they come from stayed what
they were: to know that, the host would have to wait for the copies. It is known at the next
layer's routing, which the host waits for anyway, and at the step's end. Should a session turn
out to be lost then (it was cut off after standing still for many seconds, or its model was
unloaded), what was copied is forgotten, and :class:`StepLostError` is raised. Whoever asked for
the step repeats it: a step changes nothing but what it appends to its sequences, and that is
written again.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from expertd_inference.device.device import Device
from expertd_inference.device.hold import StepHold
from expertd_inference.experts.recovery import SESSION_ENDED, Recovery
from expertd_inference.experts.source import HeldSource
from expertstore.errors import SessionLostError, UnavailableError


class StepLostError(SessionLostError):
    """What this forward pass has computed so far is void; the session is attached again."""


class StepTransaction:
    """The steps of one model, one at a time, over all of its devices."""

    def __init__(self, source: HeldSource, recovery: Recovery, devices: Sequence[Device]) -> None:
        self.hold = StepHold(source)
        self._source = source
        self._recovery = recovery
        self._devices = tuple(devices)
        # Models are called from several threads, and a session has one holder at a time.
        self._lock = threading.RLock()
        self._thread: int | None = None
        """Whose step is under way."""

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A forward pass; within another, nothing.

        Raises StepLostError, at its end too: then it is to be repeated. What torch says of a
        device is put into words.
        """
        with self._lock:
            if self.is_inside:
                yield
                return
            self._thread = threading.get_ident()
            try:
                with ExitStack() as stack:
                    for device in self._devices:
                        stack.enter_context(device.in_step())
                    self._leave_dead_daemon()
                    yield
                    self._finish()
            except BaseException as error:
                self.hold.undo()
                explained = self._explain(error) if isinstance(error, RuntimeError) else error
                if explained is error:
                    raise
                raise explained from error
            finally:
                self._thread = None

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in the midst of a step."""
        return self._thread == threading.get_ident()

    def verify(self) -> None:
        """Where the host has waited for the devices: what was copied before is good.

        Raises StepLostError if it is not.
        """
        try:
            if self.hold.check():
                self._recovery.progressed()
        except SessionLostError as error:
            self._lose(error)

    def recover(self, error: Exception) -> None:
        """A layer failed with one of SESSION_ENDED: returns attached again, or raises."""
        self.hold.undo()
        self._recovery.recover(error)

    def _explain(self, error: BaseException) -> BaseException:
        """What an error on a device means to the user, or else itself."""
        for device in self._devices:
            if (explained := device.explain(error)) is not None:
                return explained
        return error

    def _leave_dead_daemon(self) -> None:
        """As ``CpuExperts`` does: not to keep its arena beside the next daemon's."""
        while not self._source.connected:
            self._recovery.recover(UnavailableError("The daemon is gone."))

    def _finish(self) -> None:
        try:
            self.hold.release()
        except SESSION_ENDED as error:
            self._lose(error)
        else:
            self._recovery.progressed()

    def _lose(self, error: Exception) -> None:
        computed = self.hold.undo()
        self._recovery.recover(error)
        if computed:
            raise StepLostError(str(error)) from error
