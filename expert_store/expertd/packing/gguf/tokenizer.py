"""The tokenizer of a GGUF file, written as transformers reads tokenizers.

transformers builds it from the file's vocabulary (``transformers.integrations``, internal); ways to
split text that it does not know are refused, since a wrong one is a model that reads other tokens
than it was trained on.
"""

from pathlib import Path
from typing import Any

from expertd.packing.gguf.model_file import GgufModel
from expertstore.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
_FIELDS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
}
"""llama.cpp's names of what transformers takes, with its names."""
_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_GPT4_DIGITS = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_REST}",
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "bailingmoe": (rf"'(?i:[sdmt]|ll|ve|re)|{_WORDS}|\p{{N}}|{_REST}",),
    "chatglm-bpe": _GPT4,
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "deepseek-v3": _DEEPSEEK,
    "glm4": _GPT4,
    "glm5": _GPT4,
    "hunyuan": _GPT4_DIGITS,
    "kimi-k2": _KIMI,
    "refact": (r"\p{N}",),
}
"""Expressions that cut text one after the other before it is made tokens, by llama.cpp's name of
the way: those that transformers does not know. After ``refact`` comes GPT-2's own."""
_AS_GPT2 = {"gpt-2", "olmo", "mpt", "jina-es", "jina-de", "phi-2", "refact"}
"""Where GPT-2's way is right, which transformers takes if it does not know one."""


def special_tokens(model: GgufModel) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of a configuration.

    The tokens that end a turn or a message end a text, too.
    """
    ends = [
        model.get(f"{_PREFIX}{name}", -1)
        for name in ("eos_token_id", "eot_token_id", "eom_token_id")
    ]
    ends = list(dict.fromkeys(end for end in ends if end >= 0))
    found: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    for ours, theirs in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        number = model.get(f"{_PREFIX}{theirs}", -1)
        found[ours] = number if number >= 0 else None
    return found


def write_tokenizer(model: GgufModel, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template to ``folder``.

    Raises :class:`CheckpointError` if the file has none that can be read.
    """
    fields = {
        theirs: model.metadata[f"{_PREFIX}{ours}"]
        for ours, theirs in _FIELDS.items()
        if f"{_PREFIX}{ours}" in model.metadata
    }
    tokens = _check(model, fields)
    if fields.get("tokenizer_type") == "gpt2":
        fields.setdefault("merges", [])
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    template = model.text("tokenizer.chat_template")
    try:
        backend, _ = convert_gguf_tokenizer(model.architecture, fields)
        if fields.get("tokenizer_type") == "gpt2":
            _split_words(model, backend)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            model_max_length=model.get(f"{model.architecture}.context_length", 1 << 30),
            **_names(model, tokens),
            **({"chat_template": template} if template else {}),
        )
        tokenizer.save_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers and tokenizers meet in a vocabulary
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"{model.file} has a tokenizer of which transformers can make none ({reason}); pack "
            "the model's checkpoint in Hugging Face's form."
        ) from error


def _split_words(model: GgufModel, backend: Any) -> None:  # noqa: ANN401 - of tokenizers
    """Gives ``backend`` the file's way to split text; raises :class:`CheckpointError`."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = model.text(f"{_PREFIX}pre")
    if name in _SPLITS:
        splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in _SPLITS[name]]
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in _AS_GPT2)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    elif name not in GGUF_PRE_TOKENIZER_SPLITS and name not in _AS_GPT2:
        known = sorted({*_SPLITS, *_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS})
        raise CheckpointError(
            f"{model.file} splits text in a way that is not known ({name[:32] or 'unnamed'}; known "
            f"are {', '.join(known)}); pack the model's checkpoint in Hugging Face's form."
        )


def _check(model: GgufModel, fields: dict[str, Any]) -> list[str]:
    """The tokens. Raises :class:`CheckpointError` unless the vocabulary is one."""
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError(
            f"{model.file} has no tokenizer ({_PREFIX}tokens); get another file of the model."
        )
    for name in ("scores", "token_type"):
        values = fields.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
            raise CheckpointError(
                f"{model.file} has {len(tokens)} tokens and other numbers of {name} for them; "
                "download it again."
            )
    return tokens


def _names(model: GgufModel, tokens: list[str]) -> dict[str, str]:
    """The special tokens by transformers' names of them."""
    found = {}
    for ours, theirs in _TOKENS.items():
        number = model.get(f"{_PREFIX}{theirs}", -1)
        if 0 <= number < len(tokens):
            found[ours] = tokens[number]
    return found
