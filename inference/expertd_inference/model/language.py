"""The language model within a model that sees: what executors compute."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast


class LanguageModel(nn.Module):
    """The modules of ``whole`` that turn tokens to logits; nothing is copied.

    It is called as transformers' models of text are. Their forward of a model that sees would look
    for images in each step, and work out positions that executors know.
    """

    def __init__(self, whole: Any) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__()
        self.model: Any = whole.model.language_model
        self.lm_head: Any = whole.lm_head
        self.config: Any = self.model.config
        self.name_or_path: str = whole.name_or_path
        self._softcap: float | None = getattr(self.config, "final_logit_softcapping", None)

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def get_input_embeddings(self) -> Any:  # noqa: ANN401
        """As transformers' models."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:  # noqa: ANN401
        """As transformers' models."""
        return self.lm_head

    def set_attn_implementation(self, name: str) -> None:
        """As transformers' models; the vision part keeps its own."""
        self.model.set_attn_implementation(name)

    def forward(
        self,
        *,
        logits_to_keep: Tensor | int = 0,
        **given: Any,  # noqa: ANN401 - as the modules take it
    ) -> CausalLMOutputWithPast:
        """Logits [batch, rows to keep, vocabulary]; all rows with 0."""
        found = self.model(**{**given, "return_dict": True})
        hidden = found.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        # Its name depends on transformers' version.
        name = "cache" if hasattr(found, "cache") else "past_key_values"
        return CausalLMOutputWithPast(logits=logits, **{name: getattr(found, name)})


def language_model_of(model: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """What executors compute of ``model``: all of a model of text."""
    inner = getattr(model, "model", None)
    if getattr(inner, "language_model", None) is None:
        return model
    return LanguageModel(model)
