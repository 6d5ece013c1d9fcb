"""Rows that keep fewer experts than routers choose, beside others, by every executor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.packing.packer import Request
from expertd.packing.packer import pack as write_pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.on_device import device_executor
from expertd_inference.execution.program import ProgramExecutor
from expertd_inference.execution.room import Room
from expertd_inference.execution.turns import TurnsExecutor
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.fewer_experts import FewerExperts
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.loading import load_trunk
from expertd_inference.settings import DecodeGraphsMode, OnMiss
from expertd_testing.tiny_models import make_checkpoint
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import make_rig
from tests.inference.device.stepping import repeated
from tests.inference.execution.test_held import DirectorySource
from tests.inference.greedy import prompt_of
from tests.inference.pack_source import PackSource

ROOM = Room(num_blocks=8, num_sequences=4, num_rows=64)
KINDS: list[FewerExperts | None] = [
    None,
    FewerExperts(1),
    FewerExperts(3, 0.22),
    FewerExperts(1 << 30, 0.9),
]
PROMPTS = [prompt_of(9, seed=seed) for seed in range(len(KINDS))]
NEW = [7, 200]
"""What follows each prompt, a token a step."""
NUM_LAYERS, TOP_K, NUM_EXPERTS = 3, 4, 16
WAYS = ["modules", "exact", "turns", "segments"]
if native_library().library is not None:
    WAYS += ["program", "held"]


def model_of(source: PackSource, kernels: Any) -> Any:
    linear = kernels.linear if isinstance(kernels, NativeKernels) else None
    trunk = load_trunk(source.pack, source.manifest, dtype=torch.float32, linear=linear)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery, kernels)
    return trunk.model


def executor_of(way: str, pack: Path) -> tuple[Executor, PackSource]:
    if way == "segments":
        rig = make_rig(
            HeldPackSource(pack),
            num_slots=60,
            dtype=torch.float32,
            stepped=False,
            decode_graphs=DecodeGraphsMode.SEGMENTS,
            on_miss=OnMiss.COPY,
        )
        executor = device_executor(rig.model, rig.group, ROOM, 256, [].append)
        assert executor.name == "graphs"
        return executor, rig.source
    source = DirectorySource(pack) if way == "held" else PackSource(pack)
    if way in ("program", "held"):
        kernels = NativeKernels()
        model = model_of(source, kernels)
        executor = choose_for(model, ROOM, print, kernels=kernels)
        assert executor.name == "program"
    elif way == "turns":
        executor = TurnsExecutor(model_of(source, ReferenceKernels()), "asked for")
    else:
        model = model_of(source, ReferenceKernels())
        executor = choose_for(model, ROOM, print, exact=way == "exact")
        assert executor.name == "modules"
    source.waves_taken.clear()
    return executor, source


def step(executor: Executor, number: int, sequences: Sequence[int]) -> list[Tensor]:
    """The prompts of ``sequences``, or their next token, each by its own kind."""
    spans = []
    for one in sequences:
        position = len(PROMPTS[one]) + number - 1 if number else 0
        tokens = [NEW[number - 1]] if number else PROMPTS[one]
        span = Span(one, tokens, position, [one], one, Wanted.LAST, fewer=KINDS[one])
        spans.append(span)
    if executor.fits(Batch(tuple(spans))):
        return [*repeated(executor, Batch(tuple(spans))).clone()]
    return [repeated(executor, Batch((span,)))[0] for span in spans]


def decode(executor: Executor, sequences: Sequence[int]) -> list[list[Tensor]]:
    return [step(executor, number, sequences) for number in range(len(NEW) + 1)]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose routers choose four experts, and do not make their weights sum up to 1."""
    path = tmp_path_factory.mktemp("fewer")
    make_checkpoint("olmoe", path / "checkpoint", num_experts_per_tok=TOP_K)
    request = Request(path / "checkpoint", path / "pack", choose_scheme("4bit"), optimize=False)
    write_pack(request)
    return path / "pack"


@pytest.fixture(scope="module")
def expected(pack: Path) -> tuple[list[list[Tensor]], list[int]]:
    """The logits of each kind alone, its routers hooked, and how many experts it kept."""
    model = model_of(PackSource(pack), ReferenceKernels())
    found: list[list[Tensor]] = [[] for _ in range(len(NEW) + 1)]
    kept = []
    for kind, prompt in zip(KINDS, PROMPTS, strict=True):
        counts: list[int] = []
        hooks = [
            layer.mlp.gate.register_forward_hook(by_hand(kind, counts))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + NEW])).logits[0]
        for number in range(len(NEW) + 1):
            found[number].append(logits[len(prompt) - 1 + number])
        kept.append(sum(counts))
        for hook in hooks:
            hook.remove()
    return found, kept


def by_hand(kind: FewerExperts | None, counts: list[int]) -> Callable[..., Any]:
    """A hook of a router which drops experts one by one, as the documentation says."""

    def hook(_: Any, __: Any, answer: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, index = answer
        assert weights.shape[1] == TOP_K
        weights = weights.clone()
        for row in weights:
            total = float(row.sum())
            likeliest = sorted(range(TOP_K), key=lambda at: -float(row[at]))
            for rank, at in enumerate(likeliest):
                few = kind is not None and rank >= kind.most
                light = kind is not None and float(row[at]) / total < kind.least_share
                if rank and (few or light):
                    row[at] = 0
            counts.append(int((row > 0).sum()))
        return logits, weights, index

    return hook


@pytest.mark.parametrize("way", WAYS)
def test_each_row_is_computed_by_the_experts_that_it_keeps(
    way: str, pack: Path, expected: tuple[list[list[Tensor]], list[int]]
) -> None:
    executor, source = executor_of(way, pack)
    logits, kept = expected
    tolerance = 2e-2 if way in ("program", "held") else 1e-3
    for found, right in zip(decode(executor, range(len(KINDS))), logits, strict=True):
        for ours, theirs in zip(found, right, strict=True):
            assert torch.allclose(ours, theirs, atol=tolerance)
    rows = len(PROMPTS[0]) + len(NEW)
    counted = len(KINDS) if executor.fits(Batch(tuple(spans_of_two()))) else len(KINDS) - 1
    assert executor.tally.num_rows == counted * rows * NUM_LAYERS
    # As all kinds' in one step, but where each has steps of its own, and the first keeps all.
    assert executor.tally.num_experts == sum(kept[len(KINDS) - counted :])
    assert kept[1] == rows * NUM_LAYERS < kept[2] < kept[0] == TOP_K * kept[1]
    if isinstance(executor, ProgramExecutor):
        assert executor._held is None or executor._held.num_done == (way == "held") * NUM_LAYERS
    if way == "turns":
        return  # It would compute all of the sequence again.
    before = len(source.waves_taken)
    step(executor, 1, [1])
    for _, wave in source.waves_taken[before:]:
        assert len(wave) == 1, "of one row that keeps one expert"


def spans_of_two() -> list[Span]:
    return [Span(one, [1], 0, [one], one, Wanted.LAST) for one in range(2)]


def test_bits_do_not_depend_on_what_others_keep(pack: Path) -> None:
    executor, _ = executor_of("exact", pack)
    together = decode(executor, range(len(KINDS)))
    for one in range(len(KINDS)):
        for found, alone in zip(together, decode(executor, [one]), strict=True):
            assert torch.equal(found[one], alone[0])
