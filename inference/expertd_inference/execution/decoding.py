"""The loop over new tokens, for one sequence.

transformers' own loop prepares for everything at every token: batches, padding, encoders,
several devices. For one sequence without padding what is left are a forward, the same logits
processors, the choice of a token and the same stopping criteria, and the tokens are the same.
:class:`Decoding` is given to ``generate`` as ``custom_generate``, which does everything before
the loop and hands over there; what is not one plain sequence goes back to transformers' loop.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from expertd_inference.execution.choice_of_token import Choice, End, Finite
from expertd_inference.execution.lean import KERNELS
from expertd_inference.execution.steps import Steps
from expertd_inference.kv.growing import growing
from expertd_inference.model.pack_config import rope_kinds

_PLAIN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}
"""What ``generate`` hands on for a text model that was given tokens and nothing else."""

_HOOKS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_position_ids_for_generation",
    "_prefill",
    "_sample",
    "_optimize_model_for_decode",
)
"""What transformers' loop asks the model at each step, and ours does not."""


def has_own_steps(model: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Whether the model's class does something of its own at each step beside its forward pass.

    Phi-MoE, for one, computes all keys and values anew once the text is longer than its original
    context.
    """
    kind = type(model)
    return any(
        getattr(kind, name, None) is not getattr(GenerationMixin, name, None) for name in _HOOKS
    )


def is_repeatable(model: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Whether a step does what the one before did, so that it can be recorded and repeated.

    Angles that depend on the length of the text are chosen in Python, which no recording has.
    """
    return not has_own_steps(model) and not any(
        kind.get("rope_type") in ("dynamic", "longrope")
        for kind in rope_kinds(model.config.get_text_config())
    )


class Decoding:
    """Call ``model.generate(..., custom_generate=Decoding(streamer), streamer=streamer)``.

    The streamer is given twice, since transformers 5.23 does not pass it on.
    """

    def __init__(self, streamer: Any = None) -> None:  # noqa: ANN401 - transformers is untyped
        self._streamer = streamer
        self.way = ""
        """How the tokens after the first were computed: as :attr:`GenerationResult.decoding`."""
        self.begun = False
        """Whether transformers has understood what it was told, and tokens are computed."""

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
        self.begun = True
        model_kwargs.pop("streamer", None)
        if not _is_plain(model, input_ids, generation_config, model_kwargs):
            self.way = "modules (a loop of transformers)"
            if has_own_steps(model):
                self.way = f"modules ({type(model).__name__} prepares each step in its own way)"
            model_kwargs.setdefault("synced_gpus", False)
            logits_processor.append(Finite(model.dtype))
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
        cache = model_kwargs["past_key_values"]
        if isinstance(cache, DynamicCache):
            growing(cache)
        return self._decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config, cache
        )

    def _decode(
        self,
        model: Any,  # noqa: ANN401
        prompt: Tensor,  # [1, T]
        logits_processor: Any,  # noqa: ANN401
        stopping_criteria: Any,  # noqa: ANN401
        generation_config: Any,  # noqa: ANN401
        cache: DynamicCache,
    ) -> Tensor:
        room = prompt.new_empty(1, 2 * prompt.shape[1] + 256)
        room[:, : prompt.shape[1]] = prompt
        length = prompt.shape[1]
        kernels = model.__dict__.get(KERNELS)
        choose = Choice(logits_processor, kernels, sample=generation_config.do_sample)
        ended = End(stopping_criteria)
        with Steps(model, cache) as steps:
            logits = steps.prompt(prompt)
            while True:
                chosen = choose(room[:, :length], logits)
                if length == room.shape[1]:
                    room = torch.cat((room, torch.empty_like(room)), dim=1)
                room[:, length : length + 1] = chosen
                length += 1
                if self._streamer is not None:
                    self._streamer.put(chosen[0].cpu())
                if ended(room[:, :length]):
                    break
                logits = steps.step(chosen)
                self.way = steps.way
        if self._streamer is not None:
            self._streamer.end()
        return room[:, :length].clone()


def _is_plain(
    model: Any,  # noqa: ANN401 - transformers is untyped
    input_ids: Tensor,
    generation_config: Any,  # noqa: ANN401
    model_kwargs: dict[str, Any],
) -> bool:
    """Whether it is one sequence from its beginning, without padding or anything asked beside."""
    cache: Any = model_kwargs.get("past_key_values")
    mask: Tensor | None = model_kwargs.get("attention_mask")
    return (
        not has_own_steps(model)
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
