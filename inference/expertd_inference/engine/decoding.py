"""One sequence of transformers' ``generate``, computed by the worker's engine.

:class:`Decoding` is given to ``generate`` as ``custom_generate``, which does everything before the
loop over tokens and hands over there. transformers' own logits processors choose the tokens, and
its stopping criteria end the text; what is not one plain sequence goes back to transformers' loop.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from expertd_inference.engine.engine import Engine
from expertd_inference.engine.sampling import Sampling, not_finite
from expertd_inference.model.cache_name import CACHE
from expertd_inference.settings import GenerationSettings
from expertstore.errors import PreconditionError

_PLAIN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    CACHE,
    "use_cache",
    "logits_to_keep",
}
"""What ``generate`` hands on for a text model that was given tokens and nothing else."""

_MOST_TOKENS = 1 << 30
"""Where no criterion says how many: the engine cuts it to the model's context."""


class Decoding:
    """Call ``model.generate(..., custom_generate=Decoding(streamer), streamer=streamer)``.

    ``model`` is one that :func:`~expertd_inference.worker.load_model` gave. The streamer is given
    twice, since transformers does not pass it on. Greedy tokens are those of transformers'
    own loop; sampled ones depend on ``torch.manual_seed`` as well, and are others.
    """

    def __init__(self, streamer: Any = None) -> None:  # noqa: ANN401 - transformers is untyped
        self._streamer = streamer

    def __call__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        input_ids: Tensor,  # [batch, T], int64
        logits_processor: Any,  # noqa: ANN401
        stopping_criteria: Any,  # noqa: ANN401
        generation_config: Any,  # noqa: ANN401
        **model_kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 - whatever transformers' own loop returns
        """All tokens, [1, T + new]; or what transformers' loop gives for what is not plain."""
        model_kwargs.pop("streamer", None)
        if not _is_plain(model, input_ids, generation_config, model_kwargs):
            model_kwargs.setdefault("synced_gpus", False)
            logits_processor.append(_Finite(model.dtype))
            beams = generation_config.num_beams > 1
            if not beams:
                model_kwargs["streamer"] = self._streamer
            loop = model._beam_search if beams else model._sample
            return loop(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )
        return self._decode(
            model.expertd.engine,
            input_ids,
            logits_processor,
            stopping_criteria,
            sample=generation_config.do_sample,
        )

    def _decode(
        self,
        engine: Engine,
        prompt: Tensor,  # [1, T]
        logits_processor: Any,  # noqa: ANN401
        stopping_criteria: Any,  # noqa: ANN401
        *,
        sample: bool,
    ) -> Tensor:
        end = _End(stopping_criteria)
        sampling = Sampling(temperature=float(sample), processors=logits_processor or None)
        settings = GenerationSettings(
            max_new_tokens=max(1, end.max_tokens - prompt.shape[1]),
            seed=int(torch.randint(1 << 62, ())) if sample else None,
        )
        tokens = prompt
        with engine.begin(prompt[0].tolist(), settings, sampling, end.tokens) as stream:
            try:
                for new in stream:
                    chosen = torch.tensor([[new.id]], device=prompt.device)
                    tokens = torch.cat((tokens, chosen), dim=1)
                    if self._streamer is not None:
                        self._streamer.put(chosen[0].cpu())
                    if end.others and bool(end.others(tokens, None).all()):
                        break
            except PreconditionError as error:
                # What a logits processor has raised is for the caller of generate.
                raise error.__cause__ or error from None
        if self._streamer is not None:
            self._streamer.end()
        return tokens


class _Finite(LogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """For a loop of transformers, after its processors: the check that the engine makes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` as they are, or PreconditionError."""
        if not bool(scores.amax(dim=-1).isfinite().all()):
            raise not_finite(self._dtype)
        return scores


class _End:
    """A StoppingCriteriaList: what the engine knows of it, and the ``others``."""

    def __init__(self, criteria: Any) -> None:  # noqa: ANN401 - a StoppingCriteriaList
        self.max_tokens = _MOST_TOKENS
        self.tokens: frozenset[int] = frozenset()
        self.others = type(criteria)()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.tokens |= {*criterion.eos_token_id.tolist()}
            elif type(criterion) is MaxLengthCriteria and not _warns(criterion):
                self.max_tokens = min(self.max_tokens, criterion.max_length)
            else:
                self.others.append(criterion)


def _warns(criterion: Any) -> bool:  # noqa: ANN401 - a MaxLengthCriteria
    """Whether it may say, once, that the model's positions are used up."""
    positions = criterion.max_position_embeddings
    return positions is not None and criterion.max_length > positions + 1


def _is_plain(
    model: Any,  # noqa: ANN401 - transformers is untyped
    input_ids: Tensor,
    generation_config: Any,  # noqa: ANN401
    model_kwargs: dict[str, Any],
) -> bool:
    """Whether it is one sequence from its beginning, without padding or anything asked beside."""
    cache: Any = model_kwargs.get(CACHE)
    mask: Tensor | None = model_kwargs.get("attention_mask")
    return (
        hasattr(model, "expertd")
        and input_ids.shape[0] == 1
        and input_ids.shape[1] > 0
        and not model_kwargs.keys() - _PLAIN_ARGUMENTS
        and bool(model_kwargs.get("use_cache"))
        and model_kwargs.get("logits_to_keep") == 1
        and type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and (mask is None or bool((mask == 1).all()))
        and generation_config.num_beams == 1
        and not generation_config.return_dict_in_generate
        and generation_config.prefill_chunk_size is None
        and not model.config.is_encoder_decoder
    )
