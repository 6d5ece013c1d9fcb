"""Which experts the example model uses for text that it never saw, and which were foreseeable."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bench.heldout import EXAMPLE, example_module
from expertd_inference.experts.cpu import experts_modules, layer_numbers
from expertd_inference.experts.routers import find_routers
from expertstore.trace import Phase, Row, TraceModel, TraceWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS = 64
"""Of each passage; the rest counts as decoded."""

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Passage:
    """The beginning of a held-out file, as the model has read it."""

    hidden: Mapping[int, Tensor]
    """What entered each layer's experts and their router, [T, H]."""
    chosen: Mapping[int, Tensor]
    """The experts that were used, [T, k]."""


class ExampleRouting:
    """The example model's routing, as stock transformers runs it in the checkpoint's bf16."""

    def __init__(self, num_files: int, num_tokens: int, say: Callable[[str], None]) -> None:
        """Of the first ``num_tokens`` tokens (or all) of each of the first files."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16).eval()
        named = experts_modules(model)
        experts = dict(zip(layer_numbers(list(named)), named.values(), strict=True))
        self.num_experts = model.config.num_local_experts
        self.experts_per_token = model.config.num_experts_per_tok
        self.routers = find_routers(model, experts)
        corpus = example_module("corpus")
        tokenizer, texts = corpus.load_tokenizer(), corpus.read_heldout()[:num_files]
        self.passages = []
        for number, text in enumerate(texts):
            say(f"reading file {number + 1} of {len(texts)}")
            ids = corpus.encode_modules(tokenizer, [text])[:num_tokens].astype(np.int64)
            self.passages.append(_read(model, experts, torch.from_numpy(ids)))

    @property
    def num_decoded(self) -> int:
        """Tokens of all passages, their prompts aside."""
        return sum(len(next(iter(each.chosen.values()))) - PROMPT_TOKENS for each in self.passages)

    def write_trace(self, path: Path) -> None:
        """One session's, passage after passage: a prompt's merged experts, then token by token."""
        model = TraceModel(
            (self.num_experts,) * len(self.routers),
            (self.experts_per_token,) * len(self.routers),
            tuple(self.routers),
            {"model": "examples/tiny-mixtral on its held-out text"},
        )
        step = 0
        with TraceWriter(path, model) as trace:
            for passage in self.passages:
                layers = [passage.chosen[layer].tolist() for layer in self.routers]
                for place, tokens in enumerate(layers):
                    used = {expert for token in tokens[:PROMPT_TOKENS] for expert in token}
                    trace.write(Row(Phase.PREFILL, step, place, tuple(sorted(used))))
                for token in range(PROMPT_TOKENS, len(layers[0])):
                    step += 1
                    for place, tokens in enumerate(layers):
                        trace.write(Row(Phase.DECODE, step, place, tuple(tokens[token])))
                step += 1
            trace.commit()

    def recall(self, ahead: int, say: Callable[[str], None]) -> list[Shares]:
        """By passage, the share of used experts among the router's 1, 2, ... likeliest ones.

        Each layer's router is asked, token by token as by a worker that decodes, of what entered
        the router ``ahead`` layers before it.
        """

        def guess(passage: Passage, layer: int) -> Tensor:
            hidden, router = passage.hidden[layer - ahead][PROMPT_TOKENS:], self.routers[layer]
            return torch.stack([router.likeliest(row[None], self.num_experts) for row in hidden])

        return self._recall([at for at in self.routers if at - ahead in self.routers], guess, say)

    def recall_of_favourites(self, say: Callable[[str], None]) -> list[Shares]:
        """The same of guesses that are always the layer's most used experts of the whole text."""
        order = {}
        for layer in self.routers:
            used = torch.cat(
                [each.chosen[layer][PROMPT_TOKENS:].flatten() for each in self.passages]
            )
            counts = torch.bincount(used, minlength=self.num_experts)
            order[layer] = counts.argsort(descending=True)
        return self._recall(list(self.routers), lambda _, layer: order[layer][None], say)

    def _recall(
        self,
        layers: list[int],
        guess: Callable[[Passage, int], Tensor],
        say: Callable[[str], None],
    ) -> list[Shares]:
        results = []
        for number, passage in enumerate(self.passages):
            say(f"passage {number + 1} of {len(self.passages)}")
            found = [
                _found(guess(passage, layer), passage.chosen[layer][PROMPT_TOKENS:])
                for layer in layers
            ]
            results.append(np.mean(found, axis=0))
        return results


def _read(model: "PreTrainedModel", experts: Mapping[int, nn.Module], ids: Tensor) -> Passage:
    hidden: dict[int, Tensor] = {}
    chosen: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            hidden[layer], chosen[layer] = arguments[0].clone(), arguments[1].clone()

        return note

    hooks = [module.register_forward_pre_hook(watch(layer)) for layer, module in experts.items()]
    with torch.inference_mode():
        model.model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return Passage(hidden, chosen)


def _found(guesses: Tensor, chosen: Tensor) -> Shares:  # [T or 1, E], [T, k] -> [E]
    """The share of ``chosen`` that is among its token's first 1, 2, ... guesses."""
    hits = (guesses[:, :, None] == chosen[:, None, :]).any(-1)
    shares: Shares = hits.cumsum(1).double().mean(0).div(chosen.shape[1]).numpy()
    return shares
