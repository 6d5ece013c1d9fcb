"""Whether a GPU gives the CPU's logits: the example model over given text, by every way to decode.

Each way says what it was: how the arena was read, how steps ran. One that was asked for and did
not come about fails, and so do logits further from the CPU's than rounding explains.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.gpu_rig import Rig
from bench.gpu_rows import Rows
from bench.gpu_state import state_of
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference import EmbeddedDaemon, Worker
from expertd_inference.device.group import DeviceGroup
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.room import Room
from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.model.cache_name import CACHE
from expertd_inference.process.attachment import attach
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss
from expertstore.pack.manifest import Manifest, read_manifest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/tiny-mixtral"
PROMPT_TOKENS, STEPS = 12, 40
COPIED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
CPU_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
"""Of the difference's norm, as a share of the logits'.

A GPU adds in another order than the CPU: some 1e-6 of each product in float32, with forty products
one after the other; in bfloat16 results round to the neighbour now and then. Where the CPU
computes misses, its native kernels take activations in fixed point. By these alone the example's
logits move by 7e-4, in bfloat16 by 1.1e-2. One expert in the place of another, in one layer, moves
them by 0.4."""


@dataclass(frozen=True)
class Case:
    """A way to decode with room for ``share`` of the experts on the GPU."""

    mode: DecodeGraphsMode
    share: float = 0.5
    on_miss: OnMiss = OnMiss.COPY
    starved: bool = False
    """The daemon has RAM for two tokens' experts."""

    def __str__(self) -> str:
        starved = ", little RAM" if self.starved else ""
        return f"{self.mode}, {self.share:.0%} cached, {self.on_miss} on a miss{starved}"

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far its logits may be from the CPU's."""
        is_copied = self.on_miss is OnMiss.COPY
        return (COPIED_TOLERANCE if is_copied else CPU_TOLERANCE)[dtype]

    def settings(self, manifest: Manifest, device: str) -> DeviceSettings:
        """For a worker on ``device``."""
        room = int(manifest.expert_bytes * self.share) + 4 * manifest.max_record_bytes
        return DeviceSettings(
            device=device, decode_graphs=self.mode, cache_bytes=room, on_miss=self.on_miss
        )


OFF, SEGMENTS, WHOLE = DecodeGraphsMode.OFF, DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE
CASES = (
    Case(OFF, on_miss=OnMiss.AUTO),
    Case(WHOLE, 1.0),
    Case(WHOLE),
    Case(SEGMENTS),
    Case(OFF),
    Case(OFF, on_miss=OnMiss.CPU),
    Case(WHOLE, starved=True),
    Case(OFF, starved=True),
)
RUNS = (
    ("4bit", torch.float32, CASES),
    ("4bit", torch.bfloat16, CASES[1:5]),
    ("bf16", torch.float32, CASES[1:4]),
    ("paper-2bit", torch.bfloat16, CASES[2:4]),
)
FAKE_RUNS = (("4bit", torch.float32, (CASES[2], CASES[3], CASES[5], CASES[7])),)
"""Without what takes the interpreter long."""


def measure(rig: Rig, rows: Rows) -> None:
    """A row for each scheme, dtype and case."""
    steps = STEPS
    if rig.fake:
        from expertd_testing.fake_device import offer_fake_devices

        offer_fake_devices()
        steps = 3
    for scheme, dtype, cases in FAKE_RUNS if rig.fake else RUNS:
        with rows.part(f"{scheme} {dtype}"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "example"
            pack(Request(EXAMPLE, path, choose_scheme(scheme, None, None), optimize=False))
            _measure_pack(rig, rows, path, f"{scheme}, {str(dtype)[6:]}", dtype, cases, steps)


def _measure_pack(
    rig: Rig,
    rows: Rows,
    path: Path,
    title: str,
    dtype: torch.dtype,
    cases: Sequence[Case],
    steps: int,
) -> None:
    manifest = read_manifest(path).manifest
    with EmbeddedDaemon(path) as daemon:
        with _worker(daemon, dtype, None) as cpu:
            text = given_text(cpu, PROMPT_TOKENS + steps)
            expected = logits(cpu, text)
        for case in cases:
            if not rig.has(10):
                rows.cut(f"{title}, {case}", "less than 10 s were left")
            elif case.starved:
                ram = 2 * manifest.working_set_bytes
                with EmbeddedDaemon(path, ram=ram) as small:
                    _measure_case(rig, rows, small, title, dtype, case, text, expected)
            else:
                _measure_case(rig, rows, daemon, title, dtype, case, text, expected)


def _measure_case(
    rig: Rig,
    rows: Rows,
    daemon: EmbeddedDaemon,
    title: str,
    dtype: torch.dtype,
    case: Case,
    text: Tensor,
    expected: Tensor,
) -> None:
    said: list[str] = []
    device = "fake:0" if rig.fake else "cuda:0"
    with rows.part(f"{title}, {case}") as row:
        manifest = read_manifest(daemon.pack).manifest
        with _worker(daemon, dtype, case.settings(manifest, device), said) as worker:
            # Twice: with what the first left in the cache.
            found = [logits(worker, text) for _ in range(2)]
            assert isinstance(worker._runner, DeviceGroup)
            state = state_of(worker._runner)
            cost = repr(worker._runner.runners[0].cost)
        errors = [distance(each, expected) for each in found]
        reasons = []
        if max(errors) > (most := case.tolerance(dtype)):
            reasons.append(f"further from the CPU's logits than {most}")
        if state.steps != case.mode:
            reasons.append(f"{case.mode} was asked for")
        row.update(
            arena=state.arena,
            steps=state.steps,
            error=errors,
            same_choice=int((found[-1].argmax(-1) == expected.argmax(-1)).sum()),
            of=len(expected),
            replays=state.replays,
            said=said,
            cost=cost,
        )
        if reasons:
            raise RuntimeError("; ".join(reasons))


@contextmanager
def _worker(
    daemon: EmbeddedDaemon,
    dtype: torch.dtype,
    device: DeviceSettings | None,
    said: list[str] | None = None,
) -> Iterator[Worker]:
    with Worker(
        attach(daemon.name, daemon.socket),
        dtype=dtype,
        kernels="auto" if device else "reference",
        device=device,
        say=[].append if said is None else said.append,
    ) as worker:
        yield worker


def given_text(worker: Worker, num_tokens: int) -> Tensor:
    """The first tokens [num_tokens] of text that the example model was not trained on."""
    text = (EXAMPLE / "heldout.txt").read_text()[2000:4000]
    return torch.tensor(worker.tokenizer(text).input_ids[:num_tokens])


@torch.no_grad()
def logits(worker: Worker, text: Tensor, prompt_tokens: int = PROMPT_TOKENS) -> Tensor:
    """What the model expects after each token of ``text`` from the prompt's last on.

    [tokens, vocabulary] in float32 on the CPU: the prompt at once, then one token a step.
    """
    pieces = [text[:prompt_tokens], *text[prompt_tokens:].split(1)]
    rows = []
    if worker.device_stats is None:
        cache = DynamicCache(config=worker.model.config)
        for piece in pieces:
            given = {"input_ids": piece[None], CACHE: cache, "use_cache": True}
            rows.append(worker.model(**given).logits[0, -1].float())
        return torch.stack(rows)
    num_blocks = -(-len(text) // BLOCK_TOKENS)
    executor = worker.open_executor(Room(num_blocks, 1, prompt_tokens))
    position = 0
    for piece in pieces:
        span = Span(0, piece.tolist(), position, range(num_blocks), None, Wanted.LAST)
        rows.append(executor.forward(Batch((span,)))[0].float().cpu())
        position += len(piece)
    executor.close()
    return torch.stack(rows)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest, over tokens, of the difference's norm as a share of the logits'."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
