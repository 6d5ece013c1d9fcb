"""A program gives the logits of the modules that it stands for, or is not made."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference import load_model
from expertd_inference.execution import describe, rotation
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.parts import UnknownPartError
from expertd_inference.execution.program import ProgramExecutor, make_program
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu import program
from expertd_inference.kernels.cpu.library import EXACT, TYPES, native_library
from expertd_inference.kernels.cpu.linear import DTYPES
from expertd_inference.kernels.cpu.native import NativeKernels, use_isa
from expertd_inference.kernels.cpu.operations import (
    GateCall,
    NormCall,
    NormKind,
    RotateCall,
    ScaleCall,
    StepCall,
)
from expertd_inference.kernels.cpu.program import RowsProgram
from expertd_inference.model.loading import load_trunk
from expertd_testing.daemon import serving
from expertd_testing.tiny_models import make_checkpoint
from expertstore.pack.manifest import read_manifest
from tests.inference.greedy import prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]

ISAS = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16"]

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native library")

NUM_BLOCKS = 12
MULTIPLIED = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "attention_multiplier": 0.1,
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A pack of an architecture, by default with every matrix quantized."""

    @cache
    def make(architecture: str, precisions: tuple[str, ...], overrides: tuple[Any, ...]) -> Path:
        path = tmp_path_factory.mktemp("quantized")
        make_checkpoint(architecture, path / "checkpoint", **dict(overrides))
        scheme = choose_scheme("4bit", *precisions)
        pack(Request(path / "checkpoint", path / "pack", scheme, optimize=False))
        return path / "pack"

    return lambda architecture, precisions=("4g64",) * 4, **overrides: make(
        architecture, precisions, tuple(overrides.items())
    )


def model_of(pack: Path, dtype: torch.dtype = torch.float32, *, exact: bool = False) -> Any:
    source = PackSource(pack)
    kernels = NativeKernels(exact=exact)
    trunk = load_trunk(source.pack, source.manifest, dtype=dtype, linear=kernels.linear)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery, kernels)
    return trunk.model


def span(sequence: int, tokens: list[int], position: int = 0, wanted: Wanted = Wanted.ALL) -> Span:
    blocks = [3 * sequence + 2, 3 * sequence, 3 * sequence + 1]
    return Span(sequence, tokens, position, blocks, None, wanted)


def step(executor: ProgramExecutor, *spans: Span) -> list[Tensor]:
    """Its logits, span by span."""
    batch = Batch(spans)
    counts = [each.num_wanted for each in spans]
    return [part.clone() for part in torch.split(executor.forward(batch), counts)]


def expected_of(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


# Without anything; biases, a dense layer and a gated shared expert; norms of heads; of all; biases,
# sinks and windows; multipliers and tied embeddings; half of a head turned, groups of experts and
# shared ones; norms with means and a router of its own.
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("olmoe", {}),
        ("gpt_oss", {}),
        ("granitemoe", MULTIPLIED),
        ("glm4_moe", {}),
        ("phimoe", {}),
        ("mixtral", {"sliding_window": 6}),
    ],
    ids=str,
)
def test_rows_of_several_sequences_give_the_logits_of_the_modules(
    architecture: str, overrides: dict[str, Any], quantized: Make
) -> None:
    model = model_of(quantized(architecture, **overrides))
    executor = make_program(model, NUM_BLOCKS, 96)
    first, second = prompt_of(90), prompt_of(75)[::-1]
    found: list[list[Tensor]] = [[], []]
    for rows in ((60, 3), (10, 0), (1, 65), (1, 1), (1, 1), (17, 5)):
        done = [sum(map(len, parts)) for parts in found]
        pairs = zip((first, second), done, rows, strict=True)
        spans = [
            span(number, text[begin : begin + num], begin)
            for number, (text, begin, num) in enumerate(pairs)
            if num
        ]
        for each, part in zip(spans, step(executor, *spans), strict=True):
            found[each.sequence].append(part)
    for parts, text in zip(found, (first, second), strict=True):
        assert sum(map(len, parts)) == len(text)
        torch.testing.assert_close(torch.cat(parts), expected_of(model, text), rtol=0.01, atol=2e-3)


@pytest.mark.parametrize("precisions", [("4g64", "4g64", "4g64", "16"), ("4g64", *["16"] * 3)])
def test_a_trunk_of_16_bits(precisions: tuple[str, ...], quantized: Make) -> None:
    model = model_of(quantized("qwen2_moe", precisions), torch.bfloat16)
    (logits,) = step(make_program(model, NUM_BLOCKS, 16), span(0, prompt_of(12)))
    expected = expected_of(model, prompt_of(12))
    error = (logits.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
    assert error.median() < 0.02


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_rows_beside_it(threads: int, quantized: Make) -> None:
    model = model_of(quantized("qwen2_moe"), torch.bfloat16, exact=True)
    executor = make_program(model, NUM_BLOCKS, 64, EXACT)
    texts = [prompt_of(30), prompt_of(20)[::-1], prompt_of(25)[::-1]]
    alone = [
        torch.cat([step(executor, span(0, text[i : i + 1], i))[0] for i in range(len(text))])
        for text in texts
    ]
    torch.set_num_threads(threads)
    try:
        together = step(executor, *(span(i, text[:11]) for i, text in enumerate(texts)))
        rest = step(executor, *(span(i, text[11:], 11) for i, text in enumerate(texts)))
    finally:
        torch.set_num_threads(1)
    for ours, begin, end in zip(alone, together, rest, strict=True):
        assert torch.equal(torch.cat((begin, end)), ours)


def test_a_step_that_is_repeated_gives_the_same(quantized: Make) -> None:
    executor = make_program(model_of(quantized("olmoe"), torch.bfloat16), NUM_BLOCKS, 64)
    step(executor, span(0, prompt_of(9)))
    batch = span(0, [7], 9), span(1, prompt_of(5))
    first = step(executor, *batch)
    for ours, again in zip(first, step(executor, *batch), strict=True):
        assert torch.equal(ours, again)


def test_only_wanted_rows_have_logits(quantized: Make) -> None:
    executor = make_program(model_of(quantized("olmoe")), NUM_BLOCKS, 128)
    (all_rows,) = step(executor, span(0, prompt_of(100)))  # more than are computed at once
    parts = step(
        executor,
        span(0, prompt_of(100), wanted=Wanted.LAST),
        span(1, prompt_of(4), wanted=Wanted.NONE),
    )
    assert [len(part) for part in parts] == [1, 0]
    torch.testing.assert_close(parts[0], all_rows[-1:])
    assert executor.fits(Batch((span(0, prompt_of(128)),)))
    assert not executor.fits(Batch((span(0, prompt_of(129)),)))


def test_a_token_that_there_is_not_is_an_error(quantized: Make) -> None:
    executor = make_program(model_of(quantized("olmoe")), NUM_BLOCKS, 16)
    for wrong in (-1, 257):
        with pytest.raises(IndexError, match=f"token {wrong} is none of 257"):
            step(executor, span(0, [5, wrong]))


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("deepseek_v3", {}, "its DeepseekV3Attention is built otherwise"),
        ("olmoe", {"clip_qkv": 1e4}, "its attention clips what enters it"),
    ],
)
def test_what_no_program_can_compute_is_refused(
    architecture: str, overrides: dict[str, Any], reason: str, quantized: Make
) -> None:
    with pytest.raises(UnknownPartError, match=reason):
        make_program(model_of(quantized(architecture, **overrides)), NUM_BLOCKS, 16)


def test_what_computes_otherwise_is_found_out(quantized: Make) -> None:
    model = model_of(quantized("mixtral"))
    layer = model.model.layers[1]
    kind: Any = type(layer)

    class Louder(kind):  # type: ignore[misc] # of a class that is known at run time
        def forward(self, hidden_states: Tensor, **more: Any) -> Any:
            return super().forward(hidden_states, **more) * 1.5

    layer.__class__ = Louder
    with pytest.raises(UnknownPartError, match="its layer 1 computes something else"):
        make_program(model, NUM_BLOCKS, 16)


def test_a_block_of_another_kind_is_called(quantized: Make) -> None:
    model = model_of(quantized("mixtral"))
    gate = model.model.layers[1].mlp.gate
    kind: Any = type(gate)

    class Timid(kind):  # type: ignore[misc] # of a class that is known at run time
        def forward(self, hidden_states: Tensor) -> Any:
            logits, weights, index = super().forward(hidden_states)
            return logits, weights * 0.5, index

    gate.__class__ = Timid
    described, _ = describe.describe_model(model)
    assert described.layers[1].feed_forward is model.model.layers[1].mlp
    (logits,) = step(make_program(model, NUM_BLOCKS, 16), span(0, prompt_of(12)))
    torch.testing.assert_close(logits, expected_of(model, prompt_of(12)), rtol=0.01, atol=2e-3)


def test_the_same_bits_whatever_is_in_ram(quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = quantized("qwen3_moe")
    manifest = read_manifest(pack).manifest
    results, misses = [], []
    for ram in (manifest.expert_bytes, manifest.working_set_bytes):
        with serving({"m": pack}, ram=ram) as daemon:
            model = load_model("m", socket=daemon.socket, kernels="native")
            try:
                # Torch computes experts of more rows, which some have in the last step.
                monkeypatch.setattr(model.expertd.kernels, "most_rows", lambda _, __: 3)
                executor = make_program(model, NUM_BLOCKS, 16)
                logits = step(executor, span(0, prompt_of(9)))
                before = model.expertd.session.nvme_misses
                for i in range(12):
                    logits += step(executor, span(0, [i], 9 + i), span(1, [i], i))
                misses.append(model.expertd.session.nvme_misses - before)
                assert executor._held is not None
                if ram == manifest.expert_bytes:
                    for layer in manifest.layers:
                        model.expertd.session.acquire(
                            layer.layer, range(layer.num_experts)
                        ).release()
                    hits = model.expertd.session.host_hits
                    step(executor, span(0, [1], 21))
                    assert executor._held.num_done == len(manifest.layers)
                    assert model.expertd.session.host_hits == hits + 2 * len(manifest.layers)
                logits += step(executor, span(2, prompt_of(9)))
                results.append(torch.cat(logits))
            finally:
                model.expertd.close()
    assert misses[1] > misses[0]
    assert torch.equal(*results)


def run_alone(call: program.Call, rows: int = 1, **step: int) -> None:
    program = RowsProgram()
    program.add(call)
    described = StepCall(rows=rows, threads=1, **step)
    program.run(ctypes.addressof(described))


@pytest.mark.parametrize("pairs", [False, True])
def test_rotation_of_halves_and_pairs(pairs: bool) -> None:
    heads = torch.randn(2, 3, 10)
    angles = torch.rand(8, 3)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([5, 2])
    expected = rotation.rotate(
        heads.transpose(0, 1)[None], cos[positions][None], sin[positions][None], 6, pairs=pairs
    )
    call = RotateCall(
        heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), 3, 10, 6, pairs, TYPES[heads.dtype]
    )
    run_alone(call, 2, positions=positions.data_ptr())
    torch.testing.assert_close(heads.transpose(0, 1)[None], expected)


@pytest.mark.parametrize("gates", [1, 7])
def test_gates_of_one_element_or_all(gates: int) -> None:
    x, by, out = torch.randn(3, 7), torch.randn(3, gates), torch.empty(3, 7)
    call = GateCall(x.data_ptr(), by.data_ptr(), out.data_ptr(), 7, gates, TYPES[x.dtype])
    run_alone(call, 3)
    torch.testing.assert_close(out, x * torch.sigmoid(by))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_small_operations_give_the_same_bits_on_every_instruction_set(dtype: torch.dtype) -> None:
    n, kind = 300, TYPES[dtype]
    x, by = torch.randn(2, 4, n).to(dtype)
    weight, bias = torch.randn(2, n)
    cos, sin = torch.randn(2, 8, n // 2)
    positions = torch.tensor([5, 2, 0, 7])

    def computed() -> list[Tensor]:
        results = [torch.empty_like(x) for _ in range(5)]
        addresses = [result.data_ptr() for result in results]
        for norm, out in zip(NormKind, addresses[:3], strict=True):
            places = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out
            run_alone(NormCall(*places, 1, n, 1e-6, norm, kind), 4)
        run_alone(GateCall(x.data_ptr(), by.data_ptr(), addresses[3], n, n, kind), 4)
        run_alone(ScaleCall(x.data_ptr(), addresses[4], n, 0.3, 0, kind), 4)
        for pairs in (0, 1):
            results.append(x.clone())
            places = results[-1].data_ptr(), cos.data_ptr(), sin.data_ptr()
            call = RotateCall(*places, 1, n, n, pairs, kind)
            run_alone(call, 4, positions=positions.data_ptr())
        return results

    try:
        found = [computed() for isa in ISAS if use_isa(isa) is not None]
    finally:
        use_isa(None)
    for others in found[1:]:
        for ours, portable in zip(others, found[0], strict=True):
            assert torch.equal(ours, portable)
