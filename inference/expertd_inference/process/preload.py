"""Imported for what it imports: all that a worker on the CPU needs, in a process made to fork.

Each worker that :func:`.fork_server.fork_context` starts has then imported torch and transformers
already, and shares with the others the memory that they take.
"""

import gc
from importlib import import_module

from expertd_inference.process.environment import garbage_kept, prepare_environment

prepare_environment(device="cpu")
with garbage_kept():
    for _name in (
        "expertd_inference.generation",
        "expertd_inference.worker",
        "transformers.modeling_layers",
        "transformers.models.auto.tokenization_auto",
    ):
        import_module(_name)
    # Made when it is first asked for, and for all architectures at once.
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("mixtral")
# Not written to by any collection in a child, which would make a copy of it.
gc.freeze()
