"""What ``generation_config.json`` of a pack asks for, and what a generation makes of it.

Every field of transformers' GenerationConfig is one of these:

- obeyed, by the engine itself or by transformers' own processors (:mod:`.engine.wishes`);
- for an option of the command to say (:data:`SAID_BY_OPTIONS`);
- about how the tokens are computed and not which (:data:`WITHOUT_EFFECT`), which is for us to say;
- refused (:data:`REFUSED`), since it makes other text than one sequence by one model.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from expertd_inference.process.reasons import reason_of
from expertstore.errors import InvalidInputError, PackError

GENERATION_CONFIG = "generation_config.json"

SAID_BY_OPTIONS = frozenset({"max_length", "max_new_tokens", "do_sample", "temperature"})
"""Set by GenerationSettings, whatever the file says."""

WITHOUT_EFFECT = frozenset(
    {
        # Where keys and values lie, and for how many tokens there is room.
        *("cache_implementation", "cache_config", "max_cache_len"),
        # Faster ways to the same tokens, by guesses that the model confirms.
        *("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit"),
        # What generate returns beside the tokens, and how it computes them.
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "compile_config", "disable_compile"),
    }
)
"""What the text does not depend on."""


def _more_than_one(value: Any) -> bool:  # noqa: ANN401 - of a file
    return isinstance(value, int) and value > 1


def _is_given(value: Any) -> bool:  # noqa: ANN401
    return value not in (None, False, 0, [], "")


REFUSED: dict[str, Callable[[Any], bool]] = {
    "num_beams": _more_than_one,
    "num_beam_groups": _more_than_one,
    "num_return_sequences": _more_than_one,
    "constraints": _is_given,
    "force_words_ids": _is_given,
    "penalty_alpha": _is_given,
    "dola_layers": _is_given,
    "token_healing": _is_given,
    "is_assistant": _is_given,
    "assistant_ensemble_weight": _is_given,
    # Rounded keys and values give other tokens.
    "cache_implementation": lambda value: value in ("quantized", "paged"),
}
"""What is refused, and whether a value of it asks for anything."""


def _is_flag(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _is_positive(value: Any) -> bool:  # noqa: ANN401
    return _is_whole(value) and value > 0


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, str) and bool(value)


def _list_of(is_element: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_element, value))


def _one_or_more(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: is_one(value) or _list_of(is_one)(value)


def _is_decay(value: Any) -> bool:  # noqa: ANN401
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_whole(value[0])
        and value[0] >= 0
        and _is_number(value[1])
    )


def _is_bias(value: Any) -> bool:  # noqa: ANN401
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_tokens(value[0])
        and _is_number(value[1])
    )


def _is_tokens(value: Any) -> bool:  # noqa: ANN401
    return bool(value) and _list_of(_is_whole)(value)


_TYPES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "true or false",
        _is_flag,
        (
            *("do_sample", "use_mtp", "use_cache", "renormalize_logits", "remove_invalid_values"),
            *("token_healing", "output_attentions", "output_hidden_states", "output_scores"),
            *("output_logits", "return_dict_in_generate", "is_assistant", "disable_compile"),
            "low_memory",
        ),
    ),
    ('true, false or "never"', lambda x: x in (True, False, "never"), ("early_stopping",)),
    (
        "a whole number",
        _is_whole,
        (
            *("max_length", "min_length", "min_new_tokens", "max_cache_len"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_assistant_tokens"),
            *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
            *("assistant_lookbehind", "target_lookbehind", "pad_token_id"),
            "decoder_start_token_id",
        ),
    ),
    (
        "0 or more, or -1 for none",
        lambda x: _is_whole(x) and x >= -1,
        ("top_k",),
    ),
    (
        "a whole number above 0",
        _is_positive,
        (
            *("max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences"),
            "prefill_chunk_size",
        ),
    ),
    (
        "a number",
        _is_number,
        (
            *("max_time", "temperature", "top_p", "min_p", "top_h", "typical_p"),
            *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty"),
            *("length_penalty", "guidance_scale", "assistant_confidence_threshold"),
            *("assistant_ensemble_weight", "penalty_alpha", "diversity_penalty"),
        ),
    ),
    (
        "a token's number, or a list of such",
        _one_or_more(_is_whole),
        ("bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    ),
    (
        "a list of tokens' numbers",
        _list_of(_is_whole),
        ("suppress_tokens", "begin_suppress_tokens"),
    ),
    ("a list of lists of tokens' numbers", _list_of(_is_tokens), ("bad_words_ids",)),
    ("a list of pairs of tokens' numbers and a number", _list_of(_is_bias), ("sequence_bias",)),
    ("a whole number and a number", _is_decay, ("exponential_decay_length_penalty",)),
    ("text, or a list of texts", _one_or_more(_is_text), ("stop_strings",)),
    (
        "text",
        _is_text,
        ("cache_implementation", "num_assistant_tokens_schedule", "speculation_type"),
    ),
    ("an object", lambda x: isinstance(x, dict), ("cache_config", "watermarking_config")),
)

_OF_THE_VOCABULARY = (
    *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias"),
)
"""The fields whose tokens transformers looks up in the logits."""


def read_generation_config(pack: Path, config: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """The pack's; where it has no file, what its ``config`` says.

    Raises PackError, naming file and field, if the file cannot be used.
    """
    path = pack / GENERATION_CONFIG
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        try:
            return transformers.GenerationConfig.from_model_config(config)
        except (ValueError, TypeError, AttributeError) as error:
            raise PackError(
                f"{pack / 'config.json'} cannot be used: {reason_of(error)}."
            ) from error
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        fields = json.loads(text)  # NaN and Infinity included, as transformers reads it
    except (ValueError, RecursionError) as error:
        raise PackError(
            f"{path} is damaged: it is not JSON ({reason_of(error)}); copy it again, or remove it."
        ) from error
    if not isinstance(fields, dict):
        raise PackError(f"{path} is damaged: it is no JSON object; copy it again, or remove it.")
    for what, fits, names in _TYPES:
        for name in names:
            if fields.get(name) is not None and not fits(fields[name]):
                raise PackError(f"{path}: {name} is {fields[name]!r}, and must be {what}.")
    try:
        return transformers.GenerationConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise PackError(f"{path} cannot be used: {reason_of(error)}.") from error


def check_wishes(config: Any, where: str, vocabulary: int) -> None:  # noqa: ANN401
    """Checks a pack's GenerationConfig, which stands ``where``, for a model of so many tokens.

    Raises InvalidInputError for a wish that is not one sequence by one model, or for a token that
    the model does not have.
    """
    for name, asks in REFUSED.items():
        if asks(value := getattr(config, name, None)):
            raise InvalidInputError(
                f"{where} has {name} {value!r}, and one sequence is generated here, a token at a "
                f"time: remove {name} there, or call transformers' generate from Python."
            )
    for name in _OF_THE_VOCABULARY:
        if wrong := {x for x in _tokens(getattr(config, name, None)) if not 0 <= x < vocabulary}:
            raise InvalidInputError(
                f"{where} has token {min(wrong)} in {name}, and the model has 0 to "
                f"{vocabulary - 1}; mend it there."
            )


def processors_of(
    model: Any,  # noqa: ANN401 - transformers is untyped
    config: Any,  # noqa: ANN401 - a GenerationConfig, which is left as it is
    tokens: Sequence[int],
) -> Any:  # noqa: ANN401 - a LogitsProcessorList
    """Transformers' own processors and warpers for what ``config`` asks for, after a prompt.

    Raises PackError if transformers cannot do that.
    """
    config = copy.deepcopy(config)
    prompt = torch.tensor([tokens])
    try:
        model._prepare_special_tokens(config, True, device="cpu")
        return model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(tokens),
            encoder_input_ids=prompt,
            device="cpu",
            model_kwargs={},
        )
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise PackError(
            f"transformers {transformers.__version__} cannot do what {GENERATION_CONFIG} of "
            f"{model.name_or_path} asks for: {reason_of(error)}."
        ) from error


def _tokens(value: Any) -> Iterator[int]:  # noqa: ANN401 - of a file
    """All token ids in ``value``, however deep in lists."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for element in value:
            yield from _tokens(element)
