"""Host memory as a CUDA device copies from it."""

from collections.abc import Callable

from expertd_inference.device.device import CopyMode
from expertd_inference.device.registration import ArenaPiece, Registration
from expertstore.sizes import format_bytes


class CudaMemory:
    """A range of host memory, registered as far as it is and else staged, until :meth:`close`."""

    def __init__(
        self,
        address: int,
        num_bytes: int,
        registration: Registration | None,
        *,
        device_address: int = 0,
        reason: str = "",
        let_go: Callable[["CudaMemory"], None],
    ) -> None:
        """``reason`` is why not all is registered; ``let_go`` is called once, by ``close``."""
        self.address, self.num_bytes = address, num_bytes
        self.device_address = device_address
        self.reason = reason
        self._registration = registration
        self._let_go: Callable[[CudaMemory], None] | None = let_go
        registered = 0 if registration is None else registration.registered_bytes
        self.registered_bytes = registered
        partly = CopyMode.PARTIAL if registered else CopyMode.STAGED
        self._mode = CopyMode.REGISTERED if registered == num_bytes else partly

    def __repr__(self) -> str:
        return f"<CudaMemory {self.mode} {format_bytes(self.num_bytes)}>"

    @property
    def mode(self) -> CopyMode:
        """How it is read."""
        return self._mode

    def pieces(self, offset: int, num_bytes: int) -> list[ArenaPiece]:
        """As :meth:`Registration.pieces`."""
        if self._registration is None:
            return [ArenaPiece(offset, num_bytes, is_registered=False)]
        return self._registration.pieces(offset, num_bytes)

    def close(self) -> None:
        """Before it is unmapped."""
        let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go(self)
