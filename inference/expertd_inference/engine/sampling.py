"""Chooses each sequence's next token, by its own scores, settings, seed and position alone."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertd_inference.engine.matcher import Matcher
from expertd_inference.engine.nucleus import Scores, candidates
from expertd_inference.engine.token import Likely
from expertd_inference.process.reasons import reason_of
from expertstore.errors import ExpertdError, InvalidInputError, ScoresError

_NEVER = np.float32(-np.inf)
"""The score of a token that must not come."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a sequence's tokens are chosen: its settings, where these say nothing the pack's wishes.

    As :class:`~expertd_inference.settings.GenerationSettings` has them, with nothing left open.
    ``banned_tokens`` never come, ``end_tokens`` not among the first ``min_new_tokens``.
    ``processors``, transformers' own, do what else a pack wishes: they take tokens [1, T] and
    scores [1, vocabulary] and do everything from the repetition penalty to ``min_p``.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: tuple[int, ...] | None = None
    banned_tokens: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    end_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    processors: Any = None

    @property
    def edits(self) -> bool:
        """Whether scores change before one is chosen, apart from the temperature and the rest."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.allowed_tokens is not None
            or self.banned_tokens
            or self.bad_words
            or (self.end_tokens and self.min_new_tokens)
            or self.processors is not None
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token; with its log-probability by the model's own scores, if it was asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence; by a ``matcher`` only those that its grammar allows."""

    def __init__(
        self, sampling: Sampling, seed: int, num_prompt: int, matcher: Matcher | None = None
    ) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self._seed = seed
        self._num_prompt = num_prompt
        self._all = _TokenCounts()
        self._new = _TokenCounts()
        self._num_counted = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token by the model's own scores is chosen."""
        return self.sampling.temperature == 0 and not self.sampling.edits and self.matcher is None

    def choose(self, row: Scores, tokens: Sequence[int]) -> int | None:
        """The token after ``tokens``, by the model's scores ``row`` [vocabulary], left as they are.

        None if no score is finite: the model's own say nothing, or the settings leave no token.
        Raises why a grammar allows none.
        """
        wanted = self.sampling
        allowed = None if self.matcher is None else self.matcher.allowed()
        if allowed is not None and wanted.temperature == 0 and not wanted.edits:
            # A model mostly wants what its grammar allows; then there is nothing to leave out.
            likeliest = int(row.argmax())
            if allowed[likeliest] and isfinite(row[likeliest]):
                return likeliest
        scores = self._edited(row, tokens, allowed)
        if not isfinite(scores.max()):
            return None
        if wanted.temperature == 0:
            return int(scores.argmax())
        uniform = _uniform(self._seed, len(tokens))
        if wanted.processors is not None:
            return candidates(scores, 1.0).draw(uniform)
        return candidates(
            scores, wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p
        ).draw(uniform)

    def _edited(
        self,
        row: Scores,
        tokens: Sequence[int],
        allowed: NDArray[np.bool_] | None = None,  # [vocabulary]
    ) -> Scores:
        wanted = self.sampling
        scores = row if allowed is None else np.where(allowed, row, _NEVER)
        must_end = self.matcher is not None and self.matcher.must_end
        if not wanted.edits or must_end:
            return scores
        if allowed is None:
            scores = row.copy()
        for token, bias in wanted.logit_bias.items():
            scores[token] += np.float32(bias)
        self._penalize(scores, tokens)
        banned = [*wanted.banned_tokens]
        if len(tokens) - self._num_prompt < wanted.min_new_tokens:
            banned += wanted.end_tokens
        banned += [
            word[-1]
            for word in wanted.bad_words
            if len(word) == 1 or tuple(tokens[1 - len(word) :]) == word[:-1]
        ]
        scores[[token for token in banned if 0 <= token < len(scores)]] = _NEVER
        if wanted.processors is not None:
            ids = torch.tensor([tokens])
            scores = wanted.processors(ids, torch.from_numpy(scores)[None])[0].numpy()
            if allowed is not None:
                # Some processors give scores to tokens that had none.
                scores = np.where(allowed, scores, _NEVER)
        if wanted.allowed_tokens is not None:
            asked = np.zeros(len(scores), bool)
            asked[list(wanted.allowed_tokens)] = True
            scores = np.where(asked, scores, _NEVER)
        return scores

    def _penalize(self, scores: Scores, tokens: Sequence[int]) -> None:
        wanted = self.sampling
        repeats = wanted.repetition_penalty != 1 and wanted.processors is None
        if not (repeats or wanted.presence_penalty or wanted.frequency_penalty):
            return
        for at in range(self._num_counted, len(tokens)):
            self._all.add(tokens[at])
            if at >= self._num_prompt:
                self._new.add(tokens[at])
        self._num_counted = len(tokens)
        if repeats:
            seen, _ = self._all.arrays()
            penalty = np.float32(wanted.repetition_penalty)
            old = scores[seen]
            scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        new, counts = self._new.arrays()
        scores[new] -= np.float32(wanted.frequency_penalty) * counts
        scores[new] -= np.float32(wanted.presence_penalty)


class _TokenCounts:
    """How often each token came."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._tokens = array("q")
        self._counts = array("f")

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def arrays(self) -> tuple[NDArray[np.int64], Scores]:
        return np.array(self._tokens, np.int64), np.array(self._counts, np.float32)


def choose(
    logits: Tensor,  # [n, vocabulary]
    samplers: Sequence[Sampler],
    tokens: Sequence[Sequence[int]],
) -> list[Chosen | ExpertdError]:
    """The next token of each sequence, which has ``tokens`` so far, by its row of ``logits``.

    Where a row's scores say nothing, since one is no number or infinite, there is an error in the
    token's place: the likeliest would be the first, whatever came before. So there is where the
    sequence's settings leave no token. Rows do not depend on each other: each is that of its
    sequence alone.
    """
    greedy = [at for at, one in enumerate(samplers) if one.is_greedy]
    likeliest = _likeliest(logits, greedy) if greedy else {}
    results: list[Chosen | ExpertdError] = []
    for at, (sampler, before) in enumerate(zip(samplers, tokens, strict=True)):
        num_top = sampler.sampling.logprobs
        if at in likeliest and num_top is None:
            token = likeliest[at]
            results.append(not_finite(logits.dtype) if token is None else Chosen(token))
            continue
        row = _row(logits[at])
        try:
            token = likeliest[at] if at in likeliest else sampler.choose(row, before)
        except ExpertdError as error:
            results.append(error)
            continue
        except Exception as error:
            results.append(_unforeseen(error))
            continue
        if token is None:
            nothing_left = isfinite(row.max())
            results.append(_nothing_left() if nothing_left else not_finite(logits.dtype))
        elif num_top is None:
            results.append(Chosen(token))
        else:
            results.append(Chosen(token, *_likely(row, token, num_top)))
    return results


def _likeliest(logits: Tensor, rows: list[int]) -> dict[int, int | None]:
    """Of these rows the first of the largest, None if that is not finite."""
    if logits.is_cpu:
        # numpy's is 15 times as fast as torch's; for both what is no number is the largest.
        found = []
        for at in rows:
            row = _row(logits[at])
            token = int(row.argmax())
            found.append((token, isfinite(row[token])))
    else:
        chosen = logits if len(rows) == len(logits) else logits[rows]
        best = chosen.argmax(dim=-1)
        finite = chosen.gather(-1, best[:, None])[:, 0].isfinite()
        found = [*zip(best.tolist(), finite.tolist(), strict=True)]
    return {at: token if ok else None for at, (token, ok) in zip(rows, found, strict=True)}


def prompt_logprobs(
    logits: Tensor,  # [rows, vocabulary]
    targets: Sequence[int],
    num_top: int,
) -> list[Likely]:
    """For each row how likely its target, the token that follows it, was."""
    return [
        _likely(_row(row), target, num_top) for row, target in zip(logits, targets, strict=True)
    ]


def _row(logits: Tensor) -> Scores:  # [vocabulary]
    """In float32 on the CPU; without torch's threads, which cost more than a row does."""
    logits = logits.detach().to("cpu")
    if logits.dtype != torch.bfloat16:
        return logits.numpy().astype(np.float32, copy=False)
    # The upper half of a float32.
    wide = logits.view(torch.int16).numpy().astype(np.int32)
    wide <<= 16
    return wide.view(np.float32)


def _likely(row: Scores, token: int, num_top: int) -> Likely:
    highest = float(row.max())
    log_sum = highest + float(np.log(np.exp(row - np.float32(highest)).sum(dtype=np.float64)))
    num_top = min(num_top, len(row))
    if not num_top:
        return float(row[token]) - log_sum, ()
    values, tokens = torch.from_numpy(row).topk(num_top)
    # Which of equals torch gives is its own affair: the order at least is fixed.
    pairs = sorted(zip(values.tolist(), tokens.tolist(), strict=True), key=lambda x: (-x[0], x[1]))
    return float(row[token]) - log_sum, tuple((at, value - log_sum) for value, at in pairs)


def _uniform(seed: int, position: int) -> float:
    """A number from 0 to below 1, for the token at ``position`` of a sequence with this seed."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _unforeseen(error: Exception) -> ScoresError:
    failed = ScoresError(
        f"The next token's scores could not be processed as asked for: {reason_of(error)}; ask for "
        "less, or remove the wish from the pack's generation_config.json."
    )
    failed.__cause__ = error
    return failed


def _nothing_left() -> InvalidInputError:
    return InvalidInputError(
        "No token may come next: allowed_tokens, bad_words, min_new_tokens, the grammar and what "
        "the pack's generation_config.json forbids exclude all together; allow more."
    )


def not_finite(dtype: torch.dtype) -> ScoresError:
    """The error of scores that say nothing, which were computed in ``dtype``."""
    other = "float32" if dtype == torch.bfloat16 else "bfloat16"
    advice = (
        "verify the pack with `expertd verify`"
        if dtype == torch.float32
        else f"compute in {other} (--dtype {other}), and if that does not help verify the pack "
        "with `expertd verify`"
    )
    return ScoresError(
        f"The model's scores for the next token are not finite numbers, computed in "
        f"{str(dtype).removeprefix('torch.')}, so no token can be chosen: values overflow, or "
        f"weights are damaged; {advice}."
    )
