"""A model in GGUF as the tensors of a checkpoint, under the model's own names."""

from expertd.packing.architecture import Architecture
from expertd.packing.checkpoint_files import CheckpointTensor, Listing
from expertd.packing.gguf.model_file import GgufModel
from expertd.packing.gguf.origins import Origin, find_origins
from expertd.packing.gguf.types import PLAIN_TYPES
from expertd.packing.gguf.weight import GgufWeight, make_weight
from expertstore.pack.tensor_file import TensorEntry


def list_tensors(
    model: GgufModel, architecture: Architecture
) -> tuple[Listing, dict[str, GgufWeight]]:
    """All tensors, and by their names those that are made of blocks or of several tensors.

    Raises CheckpointError if the model is not whole.
    """
    state = architecture.model.state_dict()
    modules = {name: module for module in architecture.experts for name in module.parameters()}
    tensors: list[CheckpointTensor] = []
    stored: dict[str, GgufWeight] = {}
    used = set()
    for name, origin in find_origins(model, architecture).items():
        used |= set(origin.tensors)
        shape = tuple(state[name].shape)
        module = modules.get(name)
        plain = None if module else _plain(model, name, shape, origin)
        if plain is not None:
            tensors.append(plain)
            continue
        stored[name] = make_weight(
            model,
            name,
            shape,
            origin,
            of_experts=module is not None,
            is_transposed=module is not None and module.is_transposed and len(shape) == 3,
        )
        tensors.append(stored[name].tensor)
    for name, tensor in model.tensors.items():
        if name not in used:  # as tensors of any checkpoint that the model has no place for
            entry = TensorEntry(name, tensor.type.name, tensor.shape, tensor.offset, 0)
            tensors.append(CheckpointTensor(tensor.file, entry))
    return Listing(tensors), stored


def _plain(
    model: GgufModel, name: str, shape: tuple[int, ...], origin: Origin
) -> CheckpointTensor | None:
    """The parameter as a tensor of numbers, if nothing is to be done but to read it."""
    tensor = model.tensors[origin.tensors[0]]
    if origin != Origin(origin.tensors[:1]) or tensor.type not in PLAIN_TYPES:
        return None
    weight = make_weight(model, name, shape, origin)  # for its checks
    dtype = PLAIN_TYPES[tensor.type]
    entry = TensorEntry(name, dtype, weight.shape, tensor.offset, tensor.num_bytes)
    return CheckpointTensor(tensor.file, entry)
