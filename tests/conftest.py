import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is imported, by whomever, whether its kernels are compiled or
    # interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
