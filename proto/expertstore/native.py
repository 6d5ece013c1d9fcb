"""Loads a shared library of ours, if it is there and wanted. No torch.

The libraries are C++ with a plain C interface of addresses and sizes, built by ``hatch_build.py``
where a compiler was. Whoever loads one has something slower to fall back on.
"""

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SWITCH = "EXPERTD_NATIVE"
"""Set to 0 in the environment, no native code is used."""


@dataclass(frozen=True)
class Loaded:
    """A library, or else in a few words why it is not there."""

    library: ctypes.CDLL | None
    reason: str = ""


def load(
    path: Path,
    *,
    abi: int | None = None,
    functions: Iterable[str] = (),
    structures: Mapping[str, type[ctypes.Structure]] | None = None,
) -> Loaded:
    """The library at ``path``; its calls release the GIL.

    With ``abi`` its function ``expertd_abi`` must return that number: structures that it and
    Python share may have changed since it was built. It must have all ``functions``, and its
    ``structures`` must be as large as Python's: it exports ``expertd_size_of_NAME`` for each.
    """
    if os.environ.get(SWITCH) == "0":
        return Loaded(None, f"{SWITCH}=0 turns native code off")
    if not path.exists():
        return Loaded(None, f"{path.name} was not built; python hatch_build.py builds it")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Loaded(None, f"{path.name} cannot be loaded: {error}")
    structures = structures or {}
    sizes = [f"expertd_size_of_{name}" for name in structures]
    stale = not all(hasattr(library, name) for name in (*functions, *sizes))
    if abi is not None:
        stale = stale or not hasattr(library, "expertd_abi") or library.expertd_abi() != abi
    if stale:
        return Loaded(None, f"{path.name} is of other sources; python hatch_build.py builds it")
    for name, structure in structures.items():
        size_of = library[f"expertd_size_of_{name}"]
        size_of.restype = ctypes.c_int64
        native, ours = size_of(), ctypes.sizeof(structure)
        if native != ours:
            return Loaded(
                None,
                f"{name} has {native} bytes in {path.name} and {ours} in Python; "
                f"python hatch_build.py builds it",
            )
    return Loaded(library)
