"""A program gives the bits of the modules that it stands for, or is not used."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference import load_model
from expertd_inference.execution import steps
from expertd_inference.execution.known_parts import UnknownPartError
from expertd_inference.execution.lean import make_lean
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.step import step_kernels
from expertd_inference.kv import growing as kv_cache
from expertd_inference.model.loading import load_trunk
from expertd_testing.daemon import serving
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.tiny_models import make_checkpoint
from expertstore.pack.manifest import read_manifest
from tests.inference.greedy import prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native library")

PROGRAM = "program"


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A pack of an architecture whose every matrix is quantized, or those of ``precisions``."""

    @cache
    def make(
        architecture: str, precisions: tuple[str, ...] = ("4g64",) * 4, **overrides: Any
    ) -> Path:
        path = tmp_path_factory.mktemp("quantized")
        make_checkpoint(architecture, path / "checkpoint", **overrides)
        scheme = choose_scheme("4bit", *precisions)
        pack(Request(path / "checkpoint", path / "pack", scheme, optimize=False))
        return path / "pack"

    return make


def lean(source: PackSource, dtype: torch.dtype = torch.bfloat16) -> Any:
    kernels = NativeKernels()
    trunk = load_trunk(source.pack, source.manifest, dtype=dtype, linear=kernels.linear)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery, kernels)
    native = step_kernels()
    assert native is not None
    make_lean(trunk.model, native)
    return trunk.model


@contextmanager
def no_program() -> Iterator[None]:
    with mock.patch.object(steps, "DecodeProgram", side_effect=UnknownPartError("not now")):
        yield


@torch.no_grad()
def run(
    model: Any,
    prompt: list[int],
    num_tokens: int,
    past_key_values: Any = None,
    streamer: Any = None,
) -> tuple[str, Tensor]:
    """How it was computed, and the bits of all logits."""
    if past_key_values is None:
        past_key_values = DynamicCache(config=model.config)
    kv_cache.growing(past_key_values)
    kept = []
    with steps.Steps(model, past_key_values) as computed:
        logits = computed.prompt(torch.tensor([prompt]))
        while True:
            kept.append(logits.float().clone())
            token = kept[-1].argmax(-1, keepdim=True)
            if streamer is not None:
                streamer.put(token[0])
            if len(kept) == num_tokens:
                return computed.way, torch.cat(kept).view(torch.int32)
            logits = computed.step(token)


def check(model: Any, prompt: list[int], tokens: int = 8, way: str = PROGRAM) -> None:
    ours, bits = run(model, prompt, tokens)
    assert ours == way
    with no_program():
        theirs, expected = run(model, prompt, tokens)
    assert theirs == "modules (not now)"
    assert torch.equal(bits, expected)


# Without anything; with biases, a dense layer and shared experts; with norms of heads, and of all.
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bits_of_the_modules(
    architecture: str, dtype: torch.dtype, quantized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for 4 tokens, then 10, 22 and so on: keys and values move several times.
    monkeypatch.setattr(kv_cache, "MIN_TOKENS", 4)
    model = lean(PackSource(quantized(architecture)), dtype)
    # 70: experts have several tokens in the prompt; 1: the first step is the second token.
    for prompt_tokens in (1, 2, 70):
        check(model, prompt_of(prompt_tokens), 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
# As the presets have it: a head of 16 bits; and all of the trunk, with biases.
@pytest.mark.parametrize("precisions", [("4g64", "4g64", "4g64", "16"), ("4g64", *["16"] * 3)])
def test_a_trunk_of_16_bits(
    precisions: tuple[str, ...], dtype: torch.dtype, quantized: Make
) -> None:
    check(lean(PackSource(quantized("qwen2_moe", precisions)), dtype), prompt_of(9), 24)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        {"max_position_embeddings": 16},
    ],
    ids=str,
)
def test_variants_of_a_model(overrides: dict[str, Any], quantized: Make) -> None:
    frozen = {
        name: value if not isinstance(value, dict) else Frozen(value)
        for name, value in overrides.items()
    }
    check(lean(PackSource(quantized("qwen3_moe", **frozen))), prompt_of(12), 12)


class Frozen(dict[str, Any]):
    """A dict that a cache takes for a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("deepseek_v3", {}, "its DeepseekV3Attention is built otherwise"),
        ("gpt_oss", {}, "its attention is not native"),
        ("granitemoe", {}, "its GraniteMoeDecoderLayer is built otherwise"),
        ("glm4_moe", {}, "it rotates a part of each head"),
        ("mixtral", {"sliding_window": 6}, "its attention does not see all tokens"),
        # Clips nothing here, so only looking at the operations shows it.
        ("olmoe", {"clip_qkv": 1e4}, "its program does not give their bits"),
    ],
)
def test_what_is_unknown_is_computed_by_modules(
    architecture: str, overrides: dict[str, Any], reason: str, quantized: Make
) -> None:
    model = lean(PackSource(quantized(architecture, **overrides)))
    check(model, prompt_of(9), way=f"modules ({reason})")


def test_what_computes_otherwise_is_found_out(quantized: Make) -> None:
    model = lean(PackSource(quantized("mixtral")))
    kind = type(model.model.layers[1])

    class Louder(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, **more: Any) -> Any:
            return super().forward(hidden_states, **more) * 1.5

    model.model.layers[1].__class__ = Louder
    way = "modules (its program does not give their bits)"
    check(model, prompt_of(9), way=way)
    check(model, prompt_of(5), way=way)


def test_another_routing_is_found_out(quantized: Make) -> None:
    """The logits would not show it: in the rehearsal the experts are computed once."""
    model = lean(PackSource(quantized("mixtral")))
    gate = model.model.layers[1].mlp.gate
    kind = type(gate)

    class Timid(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            logits, weights, index = super().forward(hidden_states)
            return logits, weights * 0.5, index

    gate.__class__ = Timid
    check(model, prompt_of(9), way="modules (its program does not give their bits)")


def test_a_wrong_place_for_keys_is_found_out(quantized: Make) -> None:
    """The logits of the first token would not show it: the token sees what it just wrote."""
    model = lean(PackSource(quantized("mixtral")))
    appended = steps.DecodeProgram.appended
    calls = itertools.count()

    def elsewhere(self: Any, position: int) -> list[Tensor]:
        return appended(self, position - next(calls) % 2)

    with mock.patch.object(steps.DecodeProgram, "appended", elsewhere):
        way, _ = run(model, prompt_of(9), 4)
    assert way == "modules (its program does not give their bits)"


def test_hooks_are_called(quantized: Make) -> None:
    model = lean(PackSource(quantized("mixtral")))
    check(model, prompt_of(4))
    seen: list[int] = []
    handle = model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    way, _ = run(model, prompt_of(4), 5)
    assert way.startswith("modules (something is hooked")
    assert len(seen) == 5
    handle.remove()
    check(model, prompt_of(4))


def test_other_weights_are_rehearsed_anew(quantized: Make) -> None:
    model = lean(PackSource(quantized("qwen2_moe")))
    with mock.patch.object(steps, "rehearse", side_effect=steps.rehearse) as rehearsed:
        check(model, prompt_of(9))
        check(model, prompt_of(5))
        assert rehearsed.call_count == 1
        norm = model.model.layers[1].input_layernorm
        norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
        check(model, prompt_of(9))
    assert rehearsed.call_count == 2


def test_threads_may_change(quantized: Make) -> None:
    model = lean(PackSource(quantized("qwen3_moe")))
    with no_program():
        _, expected = run(model, prompt_of(9), 12)

    class Threads:
        def __init__(self) -> None:
            self.numbers = itertools.cycle([1, 3, 2])

        def put(self, _: Tensor) -> None:
            torch.set_num_threads(next(self.numbers))

        def end(self) -> None:
            torch.set_num_threads(1)

    streamer = Threads()
    way, bits = run(model, prompt_of(9), 12, streamer=streamer)
    assert way == PROGRAM
    assert torch.equal(bits, expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "infinity"])
def test_what_is_no_number_stays_none(poison: float, quantized: Make) -> None:
    model = lean(PackSource(quantized("olmoe")))
    prompt = prompt_of(9)
    check(model, prompt)
    with torch.no_grad():
        # Whatever comes after the prompt is none.
        model.get_input_embeddings().weight.fill_(poison)
    check(model, prompt)


@pytest.mark.parametrize("revoked", [(), (6,), (20, 21, 26)], ids=str)
@pytest.mark.parametrize("wave", [1, 16])
def test_waves_and_lost_leases_do_not_matter(
    wave: int, revoked: tuple[int, ...], quantized: Make
) -> None:
    pack = quantized("qwen3_moe")
    with no_program():
        _, expected = run(lean(PackSource(pack)), prompt_of(9), 10)
    source = PackSource(pack, wave=wave, revoked=frozenset(revoked))
    way, bits = run(lean(source), prompt_of(9), 10)
    assert way == PROGRAM
    assert torch.equal(bits, expected)
    assert source.num_reattached == len(revoked)


def test_misses_of_a_daemon_with_less_ram_than_model(quantized: Make) -> None:
    pack = quantized("qwen3_moe")
    with no_program():
        _, expected = run(lean(PackSource(pack)), prompt_of(9), 24)
    ram = read_manifest(pack).manifest.working_set_bytes
    with serving({"m": pack}, ram=ram) as daemon:
        model = load_model("m", socket=daemon.socket, kernels="native")
        try:
            way, bits = run(model, prompt_of(9), 24)
            assert way == PROGRAM
            assert torch.equal(bits, expected)
            assert model.expertd.session.nvme_misses > 24
        finally:
            model.expertd.close()


@pytest.mark.parametrize("at", [3, 4, 13])
def test_an_interrupt_leaves_the_tokens_that_were_done(at: int, quantized: Make) -> None:
    """In the rehearsal, and in the first and second layer of later steps; three leases a step."""
    source = PackSource(quantized("olmoe"))
    model = lean(source)
    leases = itertools.count()

    def fail() -> None:
        if next(leases) == at:
            raise KeyboardInterrupt

    source.fail = fail
    cache = DynamicCache(config=model.config)
    with pytest.raises(KeyboardInterrupt):
        run(model, prompt_of(9), 12, past_key_values=cache)
    whole = DynamicCache(config=model.config)
    run(model, prompt_of(9), 12, past_key_values=whole)
    done = 9 + at // 3 - 1
    # A module that is interrupted may have appended its token already; a program's is not counted.
    first_step = at < 6
    for layer, expected in zip(cache.layers, whole.layers, strict=True):
        length = layer.get_seq_length()
        assert length in ((done, done + 1) if first_step else (done,))
        for ours, theirs in ((layer.keys, expected.keys), (layer.values, expected.values)):
            assert torch.equal(ours, theirs[:, :, :length])


def test_the_cache_has_all_tokens_afterwards(quantized: Make) -> None:
    model = lean(PackSource(quantized("mixtral")))
    caches = []
    for context in (mock.MagicMock(), no_program()):
        caches.append(DynamicCache(config=model.config))
        with context:
            run(model, prompt_of(9), 12, past_key_values=caches[-1])
    assert caches[0].get_seq_length() == 9 + 11
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    # And it can be gone on with.
    with torch.no_grad():
        logits = [model(torch.tensor([[5]]), past_key_values=each).logits for each in caches]
    assert torch.equal(*logits)


def test_an_mlp_that_gives_more_than_a_row_is_computed_by_modules(quantized: Make) -> None:
    model = lean(PackSource(quantized("mixtral")))
    layer = model.model.layers[1]
    kind, mlp_kind = type(layer), type(layer.mlp)

    class Talkative(mlp_kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            return super().forward(hidden_states), "router logits"

    class Listening(kind):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            heard = self.mlp.forward
            with mock.patch.object(self.mlp, "forward", lambda x: heard(x)[0]):
                return super().forward(*arguments, **named)

    layer.mlp.__class__, layer.__class__ = Talkative, Listening
    layer.mlp.register_module("more", nn.Identity())  # so that the program calls it whole
    check(model, prompt_of(9), way="modules (its program does not give their bits)")


def test_threads_that_begin_during_a_rehearsal_have_programs_too(quantized: Make) -> None:
    model = lean(PackSource(quantized("mixtral")))
    inside, go_on = threading.Event(), threading.Event()
    rehearse = steps.rehearse
    ways: list[str] = []

    def slowly(model: Any, forward: Any, program: Any, token: int) -> Any:
        def held() -> Tensor:
            inside.set()
            go_on.wait(HANG_SECONDS)  # while the modules are watched
            logits: Tensor = forward()
            return logits

        return rehearse(model, held if not inside.is_set() else forward, program, token)

    def generate() -> None:
        ways.append(run(model, prompt_of(9), 4)[0])

    with mock.patch.object(steps, "rehearse", slowly):
        first = threading.Thread(target=generate)
        first.start()
        assert inside.wait(HANG_SECONDS)
        second = threading.Thread(target=generate)
        second.start()
        second.join(0.5)  # it gets to its second token, and no further
        go_on.set()
        for thread in (first, second):
            thread.join(HANG_SECONDS)
    assert ways == [PROGRAM, PROGRAM]
