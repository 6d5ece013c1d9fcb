"""Tries every architecture of transformers whose experts can be replaced, on tiny random weights.

Each is packed and run beside stock transformers: in 16 bits and in the schemes, whose weights the
stock model then gets dequantized. Not a bit of the logits may differ.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers import AutoModelForCausalLM

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.experts.cpu import experts_modules, layer_numbers
from expertd_inference.experts.llama4 import adopt_llama4
from expertd_inference.experts.routers import find_routers
from expertd_inference.kernels.activation import activation_of
from expertd_testing.tiny_models import randomize, save_model
from expertstore.errors import ExpertdError
from expertstore.pack.manifest import read_manifest
from tests.architectures.batches import batched_model, compare
from tests.architectures.parity import fill, load, logits
from tests.architectures.tiny_configs import architectures, language_model_type, tiny_config
from tests.inference.greedy import greedy, prompt_of

SCHEMES = ("8bit", "4bit", "4bit-fast", "paper-3bit", "paper-2bit")
PROMPT_TOKENS = 40
NEW_TOKENS = 16


class Result(msgspec.Struct, frozen=True):
    """What came of one architecture; ``refused`` says why it cannot be served, if so."""

    architecture: str
    model: str = ""
    features: tuple[str, ...] = ()
    activation: str = ""
    """By the native kernels' name of it; empty if only the reference can compute it."""
    routers: bool = False
    """Whether its routers can be asked ahead of time."""
    same: tuple[str, ...] = ()
    """The schemes whose logits and greedy tokens are stock's, bit for bit."""
    differs: tuple[str, ...] = ()
    together: str = ""
    """Which rows of several sequences are computed together: ``all``, ``decoding``, or ``in turns``
    if none are, and ``different`` if they are then not what each sequence is alone."""
    turns: str = ""
    """Why in turns."""
    refused: str = ""
    text_alone: bool = False
    """Whether it is the language model of one that sees or hears as well."""


class Results(msgspec.Struct, frozen=True):
    """Of all architectures, with the versions that they were found with."""

    transformers: str
    torch: str
    results: tuple[Result, ...]


def sweep(
    names: Sequence[str] = (), on_result: Callable[[Result], None] = lambda _: None
) -> Results:
    """Tries ``names``, or all; about a second for each."""
    found = []
    for name in names or architectures():
        with tempfile.TemporaryDirectory() as directory:
            found.append(try_architecture(name, Path(directory)))
        on_result(found[-1])
    return Results(transformers.__version__, torch.__version__.split("+")[0], tuple(found))


def try_architecture(name: str, directory: Path) -> Result:
    """One architecture, its checkpoint and packs in ``directory``."""
    model_type = language_model_type(name)
    if model_type is None:
        return Result(
            name, refused="transformers has no language model of it without its other parts"
        )
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    adopt_llama4(model)
    randomize(model, seed=0)
    source = directory / "checkpoint"
    save_model(model.to(torch.bfloat16).eval(), source)
    result = Result(
        name, type(model).__name__, tuple(_features(model)), text_alone=model_type != name
    )
    try:
        same, differs = [], []
        for scheme, equal in _compare(source, directory):
            (same if equal else differs).append(scheme)
    except ExpertdError as error:
        text = str(error).replace(f"{source} has the architecture {result.model}, ", "")
        return msgspec.structs.replace(result, refused=text.removesuffix("."))
    manifest = read_manifest(directory / "bf16").manifest
    experts = experts_modules(model)
    by_layer = dict(zip(layer_numbers(list(experts)), experts.values(), strict=True))
    activations = {activation_of(module) for module in by_layer.values()}
    activation = next(iter(activations)) if len(activations) == 1 else None
    return msgspec.structs.replace(
        result,
        activation="" if activation is None else activation.kind.value,
        routers=find_routers(model, by_layer, manifest).keys() == by_layer.keys(),
        same=tuple(same),
        differs=tuple(differs),
        **_together(model_type),
    )


def _together(model_type: str) -> dict[str, str]:
    executor, same = compare(batched_model(model_type))
    if executor.name == "turns":
        return {"together": "in turns" if same else "different", "turns": executor.reason}
    kind = "decoding" if executor.recurrent else "all"
    return {"together": kind if same else "different"}


def _compare(source: Path, directory: Path) -> Iterator[tuple[str, bool]]:
    """By scheme, whether ours and stock say the same. Raises ExpertdError."""
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    prompt = prompt_of(PROMPT_TOKENS, seed=1)
    for scheme in ("bf16", *SCHEMES):
        path = directory / scheme
        request = Request(source, path, choose_scheme(scheme), optimize=False)
        pack(request)
        assert read_manifest(path).manifest.scheme == scheme
        ours = load(path)
        if scheme != "bf16":
            fill(stock, path, ours)
        expected = logits(stock, prompt)
        yield (
            scheme,
            (
                bool(torch.isfinite(expected).all())
                and torch.equal(logits(ours, prompt), expected)
                and greedy(ours, prompt, NEW_TOKENS) == greedy(stock, prompt, NEW_TOKENS)
            ),
        )


def _features(model: Any) -> Iterator[str]:
    """What of the model is worth telling, as it stands in the table."""
    names = [name for name, _ in model.named_modules()]
    config = model.config.get_text_config()
    experts = experts_modules(model)
    if len(experts) < config.num_hidden_layers:
        yield "dense layers"
    if any("shared_expert" in name or "shared_mlp" in name for name in names):
        yield "shared experts"
    if (getattr(config, "n_group", None) or 1) > 1:
        yield "groups of experts"
    if any(getattr(module, "has_bias", False) for module in experts.values()):
        yield "biases"
    if getattr(config, "tie_word_embeddings", False):
        yield "tied embeddings"
    if not all(module.has_gate for module in experts.values()):
        yield "no gate"
    if getattr(config, "moe_latent_size", None):
        yield "latent experts"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "moe", "mlp"}
    if kinds:
        yield " and ".join(sorted(kind.replace("_", " ") for kind in kinds))
