"""Operations on the rows of a step, run by one native call: ``native/program.h``.

Operations are given addresses, of memory that must outlive the program; whoever builds one keeps
the tensors. Memory of rows has room for the most rows that a run has. Results are rounded where
torch rounds, and those of a row do not depend on the rows beside it.
"""

import ctypes
from typing import Any, Final

from expertd_inference.kernels.cpu.library import check_memory, native_library
from expertd_inference.kernels.cpu.operations import (
    ActivateCall,
    AddCall,
    EmbedCall,
    GateCall,
    GatherCall,
    NormCall,
    Operation,
    ProductCall,
    RotateCall,
    RouteCall,
    ScaleCall,
)
from expertd_inference.kernels.cpu.structures import AttentionCall
from expertstore.errors import PreconditionError

Call = (
    EmbedCall
    | GatherCall
    | AddCall
    | ScaleCall
    | NormCall
    | ProductCall
    | RotateCall
    | AttentionCall
    | RouteCall
    | ActivateCall
    | GateCall
)

_KINDS: Final[dict[type[ctypes.Structure], int]] = {
    kind: number
    for number, kind in enumerate(
        (
            EmbedCall,
            GatherCall,
            AddCall,
            ScaleCall,
            NormCall,
            ProductCall,
            RotateCall,
            AttentionCall,
            RouteCall,
            ActivateCall,
            GateCall,
        )
    )
}


class RowsProgram:
    """Operations in their order, planned when the first run begins."""

    def __init__(self) -> None:
        """Raises PreconditionError where there is no native library."""
        loaded = native_library()
        if loaded.library is None:
            raise PreconditionError(f"There are no native kernels: {loaded.reason}.")
        self._library: Any = loaded.library
        self._calls: list[Call] = []
        self._operations: list[Operation] = []
        self._made: int | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call, *, beside: bool = False, wanted: bool = False) -> None:
        """Appends an operation; its structure stays the caller's to change between runs.

        ``beside``: a product that does not need the product before it, so both run at once.
        ``wanted``: on the rows whose logits are wanted, and else on all.
        """
        self._calls.append(call)
        self._operations.append(
            Operation(_KINDS[type(call)], beside, wanted, 0, ctypes.addressof(call))
        )

    def made(self) -> int:
        """The address of the native program, to which nothing is added any more.

        Raises MemoryError.
        """
        if self._made is None:
            array = (Operation * len(self))(*self._operations)
            self._made = self._library.expertd_program_make(array, len(self))
            check_memory(not self._made)
        assert self._made is not None
        return self._made

    def run(self, step: int) -> None:
        """Runs all operations; ``step`` is the address of a :class:`StepCall`.

        Raises MemoryError.
        """
        status = self._library.expertd_program_run(self._made or self.made(), step)
        if status:
            check_memory(status)

    def __del__(self) -> None:
        if getattr(self, "_made", None):
            self._library.expertd_program_free(self._made)
