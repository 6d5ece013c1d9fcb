"""What an engine needs of a loaded model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_inference.model.adapters import Adapters
from expertd_inference.model.seen import Seen


class Served(Protocol):
    """A loaded model; :class:`~expertd_inference.worker.Worker` is one."""

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """Of transformers' kind."""

    @property
    def generation_config(self) -> Any:  # noqa: ANN401
        """What the pack wishes for every text: a transformers GenerationConfig."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings for."""

    @property
    def experts_per_token(self) -> Sequence[int]:
        """How many experts the router of each MoE layer chooses for a token."""

    @property
    def adapters(self) -> Adapters:
        """Those that sequences may name."""

    @property
    def context_tokens(self) -> int | None:
        """How long a sequence the model goes, prompt included; None if it does not say."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the keys and values of all layers."""

    @property
    def kv_bytes(self) -> int:
        """How much memory keys and values may take now."""

    @property
    def native_rows(self) -> Mapping[str, int | None]:
        """Up to how many rows native kernels multiply each form of matrix; None: any number."""

    def encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a text, or of a chat's messages.

        Raises InvalidInputError for what cannot be continued.
        """

    def see(self, tokens: Sequence[int], images: Sequence[bytes]) -> tuple[list[int], Seen]:
        """A prompt's tokens with room for its images, and what is to be put there.

        Raises InvalidInputError for a model that takes none, or not these.
        """

    def expect(self, tokens: Sequence[int]) -> None:
        """A text that will be computed: what it needs is read from now on. Waits for nothing."""

    def open_executor(self, room: Room) -> Executor:
        """What computes this model's steps, with memory for so many sequences."""

    def before_close(self, call: Callable[[], None]) -> Callable[[], object]:
        """Has ``call`` called when the model is about to be closed; the result forgets it."""
