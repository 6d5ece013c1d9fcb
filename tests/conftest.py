import os

from tests.usable_cuda import is_cuda_usable

if not is_cuda_usable():
    # Triton decides when it is imported, by whomever, whether its kernels are compiled or
    # interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
