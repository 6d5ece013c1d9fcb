"""Decodes the same tokens on a GPU in one way or another, and says what came of it.

Real models' shapes with random weights; the routing is replayed (:mod:`bench.gpu_routing`). A way
begins once its cache is as full as it gets: where all experts fit, each was used once. After a
way nothing of it is left on the GPU, so that the next has all of its memory.
"""

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_bound import Bound, Launches, Rates, measure_rates
from bench.gpu_replay import LaunchCount, Replay
from bench.gpu_rig import Rig
from bench.gpu_routing import routing_for, swept
from bench.gpu_state import GpuState, state_of
from expertd_client import Session
from expertd_inference.device.device import Device
from expertd_inference.device.group import DeviceGroup
from expertd_inference.device.stats import DeviceStats
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.on_device import device_executor
from expertd_inference.execution.room import Room
from expertd_inference.experts.call import leave_seat
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.kernels.cpu.choice import cpu_kernels
from expertd_inference.model.loading import load_trunk
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings
from expertstore.pack.manifest import read_manifest
from expertstore.sizes import format_bytes

WARM_TOKENS, TOKENS = 80, 40
FAKE_WARM_TOKENS, FAKE_TOKENS = 3, 2
PROMPT_TOKENS = 4
CACHE_TOKENS = 1024
"""The longest text that steps have room for: where they are recorded, attention costs by it, not by
how long texts are. The shortest that a chat asks for."""
LONG_CACHE_TOKENS = 8192


@dataclass(frozen=True)
class Decoded:
    """What a way came to, over tokens in a steady state."""

    num_sequences: int
    """So many go on in each step."""
    seconds: list[float]
    """Of each step."""
    host_seconds: float
    """Of processor time of the thread that decodes, per step."""
    moved: DeviceStats
    """Over all steps."""
    state: GpuState
    bound: Bound
    """Of a step."""
    gpu_bytes: int
    first_seconds: list[float]
    """Of the first steps, which compile, allocate and record."""

    @property
    def tokens_per_second(self) -> float:
        """On average."""
        return self.num_sequences * len(self.seconds) / sum(self.seconds)

    @property
    def copied_bytes(self) -> float:
        """Per step."""
        return self.moved.bytes_copied / len(self.seconds)

    @property
    def misses(self) -> int:
        """Uses of experts that were not on the GPU, over all tokens."""
        return self.moved.host_hits + self.moved.nvme_misses

    @property
    def hits(self) -> float:
        """The share of uses whose expert was on the GPU."""
        hits = self.moved.device_hits + self.moved.prefetch_useful
        return hits / max(1, hits + self.misses)

    def cached(self, cache_bytes: int, expert_bytes: int) -> str:
        """What the cache held, in words: all only if nothing was missed."""
        if cache_bytes < expert_bytes:
            return f"a cache of {format_bytes(cache_bytes)}"
        return f"room for all, {self.misses} misses" if self.misses else "all cached"

    def row(self, cache_bytes: int, expert_bytes: int) -> dict[str, Any]:
        """For :class:`bench.gpu_rows.Rows`."""
        moved, tokens = self.moved, len(self.seconds)
        return {
            "arena": self.state.arena,
            "steps": self.state.steps,
            "tokens_per_s": self.tokens_per_second,
            "sequences": self.num_sequences,
            "bound": self.num_sequences / self.bound.seconds,
            "bound_by": self.bound.by,
            "of_bound": self.tokens_per_second * self.bound.seconds / self.num_sequences,
            "cached": self.cached(cache_bytes, expert_bytes),
            "hits": self.hits,
            "MB_a_token": self.copied_bytes / 1e6,
            "median_ms": statistics.median(self.seconds) * 1e3,
            "best_ms": min(self.seconds) * 1e3,
            "host_cpu_ms": self.host_seconds * 1e3,
            "syncs_a_token": moved.syncs / tokens,
            "replays": self.state.replays,
            "cpu_computed": moved.cpu_computed,
            "guesses": moved.prefetch_issued,
            "guesses_useful": moved.prefetch_useful,
            "guesses_late": moved.prefetch_late,
            "gpu_GB": self.gpu_bytes / 1e9,
            "first_ms": [seconds * 1e3 for seconds in self.first_seconds],
        }


class Decoder:
    """A trunk, its experts in a daemon's RAM, and tokens whose routing is known."""

    def __init__(self, rig: Rig, shape: str, pack: Path, session: Session) -> None:
        self.rig, self.shape, self._session = rig, shape, session
        self.manifest = manifest = read_manifest(pack).manifest
        device = rig.open_device()
        self.rates: Rates = measure_rates(rig, device)
        where, on_gpu = str(device.torch_device), device.torch_device.type == "cuda"
        device.close()
        rig.say(f"{shape}: loading the trunk")
        kernels = cpu_kernels("auto", manifest, rig.say)
        placed = {layer.layer: where for layer in manifest.layers} if on_gpu else None
        self._trunk = load_trunk(
            pack, manifest, linear=kernels.linear if on_gpu else None, placed=placed
        )
        self._fill = kernels.fill_slots
        layers = manifest.layers
        self._warm_tokens = FAKE_WARM_TOKENS if rig.fake else WARM_TOKENS
        self._tokens = FAKE_TOKENS if rig.fake else TOKENS
        routing = routing_for(
            shape,
            len(layers),
            layers[0].num_experts,
            layers[0].experts_per_token,
            self._warm_tokens + self._tokens,
            rig.traces,
        )
        rig.say(f"{shape}: routing {routing.what}")
        self._routing, self._sweep_tokens = swept(routing, layers[0].num_experts)
        self._forward = self._trunk.model.forward
        self._trunk_bytes = sum(
            tensor.nbytes
            for name, tensor in (
                *self._trunk.model.named_parameters(),
                *self._trunk.model.named_buffers(),
            )
            if "embed_tokens" not in name
        )

    @torch.no_grad()
    def decode(
        self,
        settings: DeviceSettings,
        *,
        staged: bool = False,
        cache_tokens: int = CACHE_TOKENS,
        num_sequences: int = 1,
        profile: Path | None = None,
    ) -> Decoded:
        """The tokens, by ``settings``; ``staged``: without registering the arena.

        ``cache_tokens`` are the longest text that steps have room for; so many sequences go on in
        each. A table of two steps' kernels is appended to ``profile``.
        """
        self._let_go()  # of what an error kept
        device = self.rig.open_device(staged=staged)
        group = None
        try:
            group = DeviceGroup(
                self.manifest,
                self._session,
                Recovery(self._session, reattach_seconds=0, say=self.rig.say),
                settings,
                dict.fromkeys((layer.layer for layer in self.manifest.layers), device),
                fill=self._fill,
            )
            return self._decode(device, group, settings, cache_tokens, num_sequences, profile)
        finally:
            if group is not None:
                # Not the group, which would give up the trunk, too.
                for runner in group.runners:
                    runner.close()
                    # Whoever still knows the runner keeps no slots.
                    runner.engine.slots = runner.engine.slots.new_empty(0)
            device.close()
            del group
            self._let_go()

    def _decode(
        self,
        device: Device,
        group: DeviceGroup,
        settings: DeviceSettings,
        cache_tokens: int,
        num_sequences: int,
        profile: Path | None,
    ) -> Decoded:
        model, where = self._trunk.model, device.torch_device
        group.connect(model, self._trunk.experts, self.manifest, self.rig.say)
        replay = Replay(self._trunk, self._routing, where)
        if settings.layers_guessed:
            routers = replay.routers()
            for runner in group.runners:
                runner.speculate(routers, group._runners)
        each = cache_tokens // BLOCK_TOKENS
        room = Room(num_sequences * each, num_sequences, num_sequences * PROMPT_TOKENS)
        executor = device_executor(model, group, room, cache_tokens, self.rig.say)
        tables = [range(number * each, (number + 1) * each) for number in range(num_sequences)]
        position, tokens = 0, [list(range(PROMPT_TOKENS)) for _ in tables]
        seconds: list[float] = []

        def step() -> None:
            nonlocal position, tokens
            batch = Batch(
                tuple(
                    Span(number, tokens[number], position, table, None, Wanted.LAST)
                    for number, table in enumerate(tables)
                )
            )
            device.mark().wait()
            begin = device.clock()
            (found,) = device.to_host(executor.forward(batch).argmax(-1, keepdim=True))
            seconds.append(device.clock() - begin)
            position, tokens = position + len(tokens[0]), found.tolist()
            replay.counter.add_(num_sequences)

        step()  # the prompts
        seconds.clear()
        fits = (settings.cache_bytes or 0) >= self.manifest.expert_bytes
        warm_tokens = self._warm_tokens + (self._sweep_tokens if fits else 0)
        replay.counter.fill_(0 if fits else self._sweep_tokens)
        # By the modules, which ask for what recorded steps were recorded with.
        with LaunchCount() as launches, group.transaction.forward_pass():
            replay.launches = launches
            model(input_ids=torch.zeros(1, num_sequences, dtype=torch.int64, device=where))
        replay.launches = None
        for _ in range(warm_tokens):
            step()
        before, began = group.stats, time.thread_time()
        for _ in range(self._tokens):
            step()
        host_seconds = (time.thread_time() - began) / self._tokens
        moved, state = group.stats.since(before), state_of(group)
        counted = _launched(launches, state.steps)
        read = self._trunk_bytes + self.manifest.working_set_bytes
        bound = self.rates.bound(moved.bytes_copied / self._tokens, read, counted)
        on_gpu = where.type == "cuda"
        if profile is not None and on_gpu:
            replay.counter.fill_(self._sweep_tokens)
            _profile(step, profile, f"{self.shape}, {state.steps}, {settings}")
        replay.close()
        executor.close()
        return Decoded(
            num_sequences,
            seconds[warm_tokens : warm_tokens + self._tokens],
            host_seconds,
            moved,
            state,
            bound,
            torch.cuda.memory_allocated(where) if on_gpu else 0,
            seconds[:3],
        )

    def _let_go(self) -> None:
        """Of runners, slots and graphs, which refer to each other."""
        self._trunk.model.forward = self._forward
        for module in self._trunk.experts.values():
            leave_seat(module)
        # One tensor's end may be what makes another's cycle unreachable.
        for _ in range(5):
            if not gc.collect():
                break
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _launched(launches: LaunchCount, steps: str) -> Launches:
    both = launches.trunk + launches.experts
    if steps == DecodeGraphsMode.OFF:
        return Launches(eager=both)
    if steps == "segments":
        return Launches(eager=launches.experts, recorded=launches.trunk)
    return Launches(recorded=both)


def _profile(step: Any, path: Path, title: str) -> None:  # noqa: ANN401
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        step()
    table = profiled.key_averages().table(
        sort_by="self_device_time_total", row_limit=45, max_name_column_width=70
    )
    with path.open("a") as file:
        file.write(f"\n== {title}, two tokens\n{table}")
