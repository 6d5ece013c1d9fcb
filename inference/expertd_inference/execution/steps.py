"""The forward passes of one sequence: the prompt's, and then one token's after the other."""

from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor

from expertd_inference.execution.decode_program import DecodeProgram
from expertd_inference.execution.known_parts import UnknownPartError
from expertd_inference.execution.rehearsal import MODULES_CHANGE, rehearse

BY_PROGRAM = "program"
"""What :attr:`Steps.way` is where tokens are computed by a :class:`DecodeProgram`."""

# Whether a model's program, told by where its weights are, gave the bits of its modules.
_rehearsed: "WeakKeyDictionary[Any, dict[tuple[int, ...], bool]]" = WeakKeyDictionary()


class Steps:
    """By the model's modules, or from the second new token on by a program, if it has one.

    A context manager: at its end the cache has all tokens, whichever way they came.
    """

    def __init__(self, model: Any, cache: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._model = model
        self._cache = cache
        self._program: DecodeProgram | None = None
        self.way = ""
        """``program``, or ``modules`` and why; empty before the first :meth:`step`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._program is not None:
            self._program.show()

    def prompt(self, tokens: Tensor) -> Tensor:  # [1, T] -> [1, vocabulary]
        """The logits after the last of ``tokens``."""
        logits: Tensor = self._model(
            input_ids=tokens,
            past_key_values=self._cache,
            use_cache=True,
            # The last position's alone: a prompt's would be its length times the vocabulary.
            logits_to_keep=1,
            return_dict=True,
        ).logits[:, -1]
        return logits

    def step(self, token: Tensor) -> Tensor:  # [1, 1] -> [1, vocabulary]
        """The logits after one more token; good until the next step."""
        if self._program is not None:
            return self._program.step(int(token))
        if self.way:
            return self.prompt(token)
        return self._first_step(token)

    def _first_step(self, token: Tensor) -> Tensor:
        """Decides how the rest is computed."""
        logits = None
        with MODULES_CHANGE:
            try:
                program = DecodeProgram(self._model, self._cache, self._cache.get_seq_length())
            except UnknownPartError as error:
                self.way = f"modules ({error})"
                return self.prompt(token)
            known = _rehearsed.setdefault(self._model, {})
            weights = tuple(program.fingerprint)
            if weights not in known:
                logits, known[weights] = rehearse(
                    self._model, lambda: self.prompt(token), program, int(token)
                )
        if known[weights]:
            self.way, self._program = BY_PROGRAM, program
        else:
            self.way = "modules (its program does not give their bits)"
        return self.step(token) if logits is None else logits
