"""Whether a sequence can be computed at all."""

from collections.abc import Iterable

from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.engine.sequence import Sequence
from expertstore.errors import InvalidInputError, PromptTooLongError, SettingError


def check_sequence(sequence: Sequence, limits: SchedulerLimits, max_tokens: int) -> None:
    """Checks a new sequence, of which the context and the KV memory take ``max_tokens``.

    Raises InvalidInputError for a prompt without tokens or a token that the model does not have,
    in the prompt, SettingError for one in a setting, or for more experts than its routers choose,
    and PromptTooLongError if nothing could follow the prompt, which may fill the context only if
    nothing shall.
    """
    if not sequence.tokens:
        raise InvalidInputError("The prompt is empty; this model needs at least one token.")
    if (num_tokens := limits.vocabulary) is not None:
        for token in (min(sequence.tokens), max(sequence.tokens)):
            if not 0 <= token < num_tokens:
                raise InvalidInputError(f"The prompt {_unknown(token, num_tokens)}")
        for name, token in sequence.settings.named_tokens():
            if not 0 <= token < num_tokens:
                raise SettingError(f"{name} {_unknown(token, num_tokens)}", setting=name)
    check_experts(sequence.settings.experts_per_token, limits.experts_per_token)
    if sequence.num_prompt < max_tokens + sequence.settings.prompt_only:
        return
    if max_tokens == limits.context_tokens:
        place, advice = f"the model's context of {max_tokens}", "shorten it"
    else:
        place = f"the KV memory of this worker, which has room for {max_tokens} in all"
        advice = "shorten it, or give the KV memory more"
    raise PromptTooLongError(
        f"The prompt has {sequence.num_prompt} tokens, which leaves no room in {place}; {advice}.",
        num_tokens=sequence.num_prompt,
        limit=max_tokens,
    )


def check_experts(asked: int | None, choices: Iterable[int]) -> None:
    """Raises SettingError if more experts are asked for than routers choose for a token."""
    most = max(choices, default=None)
    if asked is not None and most is not None and asked > most:
        raise SettingError(
            f"experts_per_token is {asked}, and this model's routers choose {most}; give 1 to "
            f"{most}.",
            setting="experts_per_token",
        )


def _unknown(token: int, num_tokens: int) -> str:
    return f"has token {token}, and the model has 0 to {num_tokens - 1}; leave that token out."
