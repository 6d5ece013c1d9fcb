"""What a model's metadata says, asked by llama.cpp's keys without the architecture's prefix."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from expertd.packing.gguf.model_file import GgufModel
from expertstore.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class Metadata:
    """Of ``model``; what is asked for and of another kind raises :class:`CheckpointError`."""

    model: GgufModel

    def get(self, key: str, default: T) -> T:
        """The value, or ``default`` where there is none; of a float the shortest decimal."""
        value = self.model.get(f"{self.model.architecture}.{key}", default)
        if isinstance(value, float):
            return type(default)(str(np.float32(value)))
        return value

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return f"{self.model.architecture}.{key}" in self.model.metadata

    def number(self, key: str) -> int:
        """A whole number that must be there."""
        return self.model.number(f"{self.model.architecture}.{key}")

    def optional(self, key: str) -> int | None:
        """A whole number, or None."""
        return self.number(key) if self.has(key) else None

    def per_layer(self, key: str) -> list[int]:
        """A number for each layer, where the file has one for all or one for each."""
        value = self.model.metadata.get(f"{self.model.architecture}.{key}")
        if not isinstance(value, list):
            return [self.number(key)] * self.num_layers
        if len(value) < self.num_layers or not all(type(each) in {int, bool} for each in value):
            raise CheckpointError(
                f"{self.model.file} has {self.model.architecture}.{key} for {len(value)} of "
                f"{self.num_layers} layers; download it again."
            )
        return [int(each) for each in value[: self.num_layers]]

    @property
    def num_layers(self) -> int:
        """Without those that predict further tokens (MTP), which no worker uses."""
        return self.number("block_count") - self.get("nextn_predict_layers", 0)

    def size(self, tensor: str, dimension: int) -> int:
        """The size of the first tensor named ``tensor``, or ``blk.N.tensor`` in any layer."""
        for name, found in self.model.tensors.items():
            if name == tensor or (name.startswith("blk.") and name.endswith(f".{tensor}")):
                return found.shape[dimension]
        raise CheckpointError(f"{self.model.file} lacks {tensor}; get a newer file of the model.")

    def has_tensor(self, tensor: str) -> bool:
        """Whether there is one of that name, or ``blk.N.tensor`` in any layer."""
        return any(
            name == tensor or (name.startswith("blk.") and name.endswith(f".{tensor}"))
            for name in self.model.tensors
        )

    def rope(self, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - what JSON holds
        """``rope_parameters`` of a configuration, with ``more`` of the architecture."""
        kind = self.get("rope.scaling.type", "none")
        found: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": self.get("rope.freq_base", 1e4),
        }
        if kind in {"linear", "yarn"}:
            found |= {"rope_type": kind, "factor": self.get("rope.scaling.factor", 1.0)}
        elif kind != "none":
            raise CheckpointError(
                f"{self.model.file} scales its rotary frequencies by {kind[:32]}, which is not "
                "read; pack the model's checkpoint in Hugging Face's form."
            )
        if kind == "yarn":
            prefix = "rope.scaling"
            found["original_max_position_embeddings"] = self.number(
                f"{prefix}.original_context_length"
            )
            for ours, theirs in (
                ("beta_fast", "yarn_beta_fast"),
                ("beta_slow", "yarn_beta_slow"),
                ("attention_factor", "yarn_attn_factor"),
            ):
                if self.has(f"{prefix}.{theirs}"):
                    found[ours] = self.get(f"{prefix}.{theirs}", 1.0)
        return found | more
