import os
from contextlib import suppress

from tests.usable_cuda import is_cuda_usable

if not is_cuda_usable():
    # Triton decides when it is imported, by whomever, whether its kernels are compiled or
    # interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

with suppress(ModuleNotFoundError):  # a GPU host's Python need not have it
    from hypothesis import settings

    # One example may take long on a busy machine, and that says nothing about the code.
    settings.register_profile("expertd", deadline=None)
    settings.load_profile("expertd")
