"""Which tokens a grammar lets follow: masks by llguidance, computed beside the forward pass."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from expertd_inference.engine.served import Served
from expertd_inference.grammar import GrammarSpec, library, limits, source_of, wrong
from expertd_inference.process.reasons import reason_of
from expertstore.errors import ExpertdError, InvalidInputError

_END = "<|the grammar's own end|>"
"""A token that llguidance takes for the end: ours are of a sequence, not of a tokenizer."""


class Grammars:
    """Makes the matchers of one engine's sequences, and has a thread for their masks.

    The first one makes llguidance's form of the tokenizer, which takes 1 to 3 s for 150,000 tokens.
    """

    def __init__(self, worker: Served) -> None:
        self.vocabulary = worker.vocabulary
        """How many scores the model gives; of tokens there may be fewer."""
        self.known: NDArray[np.bool_] = np.zeros(self.vocabulary, np.bool_)
        """Those that the tokenizer has: others are never allowed. Filled with the first matcher."""
        self._worker = worker
        self._making = threading.Lock()
        self._tokens: Any = None  # an LLTokenizer
        self._executor: Any = None  # an LLExecutor
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def matcher(
        self,
        spec: GrammarSpec,
        end_tokens: frozenset[int],
        generated: Sequence[int] = (),
    ) -> "Matcher":
        """For a sequence that has ``generated`` already, and may end by ``end_tokens``.

        Any thread may ask. Raises InvalidInputError for a grammar that is none, that this
        tokenizer's tokens cannot write, or that ``generated`` does not begin; PreconditionError
        if llguidance is not installed.
        """
        source = source_of(spec)
        with self._making:
            if self._tokens is None:
                tokenizer = self._worker.tokenizer
                tokens = _tokens_of(tokenizer, self.vocabulary)
                ids = np.array([*tokenizer.get_vocab().values()])
                self.known[ids[ids < self.vocabulary]] = True
                self._executor = library().LLExecutor()
                self._tokens = tokens
        state = library().LLMatcher(self._tokens, source, log_level=0, limits=limits())
        if not state.is_error():
            state.consume_tokens([*generated])
        if state.is_error():
            raise wrong(spec, state.get_error())
        matcher = Matcher(self, spec, state, end_tokens)
        self.look([matcher])
        matcher.allowed()  # raises if it is nothing
        return matcher

    def look(self, matchers: "Sequence[Matcher]") -> None:
        """Computes what may follow in each, all at once."""
        words = (self._tokens.vocab_size + 31) // 32
        masks = np.zeros((len(matchers), words), np.int32)
        states = [(matcher.state, at) for at, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(states, masks.ctypes.data, words * 4, len(masks))
        for matcher, mask in zip(matchers, masks, strict=True):
            matcher.saw(mask)

    def look_later(self, matchers: "Sequence[Matcher]") -> None:
        """As :meth:`look`, in the thread; each matcher waits for it when it is asked."""
        looking = self._thread.submit(self.look, matchers)
        for matcher in matchers:
            matcher.looking = looking

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()


class Matcher:
    """The grammar of one sequence, and how far the sequence has come in it.

    The engine's thread has it once the sequence has begun. What may follow is computed after each
    token (:func:`follow`), and is no matter of what other sequences do.
    """

    def __init__(
        self,
        grammars: Grammars,
        spec: GrammarSpec,
        state: Any,  # noqa: ANN401 - an LLMatcher
        end_tokens: frozenset[int],
    ) -> None:
        self.grammars = grammars
        self.state = state
        self.looking: Future[None] | None = None
        """The computation of what may follow, if it may not have ended."""
        self.error: ExpertdError | None = None
        """Why the sequence cannot go on."""
        self.must_end = False
        """Whether nothing may follow but the end."""
        self.has_ended = False
        """Whether the last token was the text's end, or left nothing but the end."""
        self._spec = spec
        self._ends = sorted(token for token in end_tokens if token < grammars.vocabulary)
        self._allowed: NDArray[np.bool_] = np.zeros(grammars.vocabulary, np.bool_)
        self._may_end = False

    def allowed(self) -> NDArray[np.bool_]:  # [vocabulary]
        """Which tokens may follow; waits until that is computed. Raises why none may."""
        if self.looking is not None:
            self.looking.result()
            self.looking = None
        if self.error is not None:
            raise self.error
        return self._allowed

    def saw(self, mask: NDArray[np.int32]) -> None:
        """Takes llguidance's mask, a bit for each of its tokens."""
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)
        allowed = bits[: self.grammars.vocabulary] & self.grammars.known
        self._may_end = self.state.is_accepting()
        self.must_end = self._may_end and not allowed.any()
        if self._may_end:
            allowed[self._ends] = True
        self._allowed = allowed
        if not allowed.any():
            reason = self.state.get_error() if self.state.is_error() else ""
            self.error = wrong(self._spec, reason or "none of this model's tokens may follow")

    def take(self, token: int) -> bool:
        """The sequence has one more token; whether others may follow."""
        if self._may_end and token in self._ends:
            self.has_ended = True
        elif not self.state.consume_token(token):
            self.error = wrong(self._spec, self.state.get_error())
        elif self.state.is_stopped():
            self.has_ended = self.state.is_accepting()
            self.error = None if self.has_ended else wrong(self._spec, self.state.stop_reason())
        return not self.has_ended and self.error is None


def follow(taken: Sequence[tuple[Matcher, int]]) -> None:
    """Each of these sequences has one more token: computes what may come after it.

    A thread does so, while the engine computes its next step. All are of one engine.
    """
    if going := [matcher for matcher, token in taken if matcher.take(token)]:
        going[0].grammars.look_later(going)


def _tokens_of(tokenizer: Any, vocabulary: int) -> Any:  # noqa: ANN401 - an LLTokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidInputError(
            "This model's tokenizer is not of the tokenizers library, which structured output "
            "needs; leave the grammar out."
        )
    try:
        # A copy: nobody else's tokenizer changes.
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([AddedToken(_END, special=True)])
        end = copy.token_to_id(_END) or 0
        return library().LLTokenizer(copy.to_str(), n_vocab=max(vocabulary, end + 1), eos_token=end)
    except ExpertdError:
        raise
    except Exception as error:  # the libraries have none but Exception, and ValueError
        raise InvalidInputError(
            f"llguidance cannot use this model's tokenizer: {reason_of(error)}; leave the grammar "
            "out."
        ) from error
