"""The paper's ablation: decoding with all of it, without speculation, without a cache, naively.

Real models' shapes with random weights; the routing is replayed (:mod:`bench.gpu_routing`), in
the place of what random routers choose. Each row is tokens per second beside the bound: what the
link needs for the bytes that were copied, or the GPU's memory for the bytes that were read,
whichever takes longer.

- *full*: cache, speculation one layer ahead
- *no speculation*: the cache alone
- *no cache*: room for one layer's experts, so that nearly every use is a copy
- *naive*: the same, by way of a pinned buffer instead of DMA from the shared memory
- *segments*, *whole*: as *full* and *no speculation*, with steps recorded as CUDA graphs
- *CPU share*: as *full*, with misses split between link and CPU
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.figures import Figure, compared, counted
from bench.gpu_copies import link_bytes_per_second, memory_bytes_per_second
from bench.gpu_rig import OutOfTimeError, Rig
from bench.gpu_routing import Routing, routing_for
from expertd.errors import ExpertdError
from expertd.pack.manifest import Manifest, read_manifest
from expertd_client import Session
from expertd_inference.device.graphs import DecodeCache
from expertd_inference.device.group import DeviceGroup
from expertd_inference.kernels.choice import cpu_kernels
from expertd_inference.loading import TrunkModel, load_trunk
from expertd_inference.recovery import Recovery
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss

PART = "decode"
BUDGETS = (24 << 30, 12 << 30, 6 << 30)
WARM_TOKENS, TOKENS = 16, 32
GOAL_OF_BOUND = 0.85
GOAL_OF_LINK = 0.95
GOAL_CACHED = 100.0
GUESSED_RIGHT = 0.85
"""How often the next layer's router, applied to this layer's input, names an expert that is then
used; typical of trained models. Random ones have nothing to guess from."""
_NO_SPECULATION = {"speculate_layers": 0}


@dataclass(frozen=True)
class Rates:
    """What the host can do, in bytes per second."""

    link: float
    memory: float


@dataclass(frozen=True)
class Way:
    """A row of the ablation; ``no_cache`` is of one layer's experts."""

    name: str
    settings: Mapping[str, Any]
    no_cache: bool = False
    staged: bool = False
    once: bool = False
    """With the middle budget alone: ten minutes are short."""


WAYS = (
    Way("full", {}),
    Way("no speculation", _NO_SPECULATION),
    Way("no cache", _NO_SPECULATION, no_cache=True),
    Way("naive", _NO_SPECULATION, no_cache=True, staged=True),
    Way("segments", {"decode_graphs": DecodeGraphsMode.SEGMENTS}, once=True),
    Way("whole", {"decode_graphs": DecodeGraphsMode.WHOLE, **_NO_SPECULATION}),
    Way("CPU share", {"on_miss": OnMiss.AUTO}, once=True),
)


def measure(rig: Rig, shape: str, pack: Path, session: Session) -> Iterator[Figure]:
    """Each way with each budget; what does not depend on the budget, once."""
    manifest = read_manifest(pack).manifest
    rig.need(30)
    device = rig.open_device()
    rates = Rates(link_bytes_per_second(rig, device), memory_bytes_per_second(rig, device))
    where = str(device.torch_device)
    on_gpu = device.torch_device.type == "cuda"
    device.close()
    rig.say(f"{shape}: loading the trunk")
    kernels = cpu_kernels("auto", manifest, rig.say)
    placed = {layer.layer: where for layer in manifest.layers} if on_gpu else None
    trunk = load_trunk(pack, manifest, linear=kernels.linear if on_gpu else None, placed=placed)
    layers = manifest.layers
    routing = routing_for(
        shape,
        len(layers),
        layers[0].num_experts,
        layers[0].experts_per_token,
        WARM_TOKENS + TOKENS,
        rig.traces,
    )
    rig.say(f"{shape}: routing {routing.what}")
    decoder = _Decoder(rig, manifest, session, trunk, routing, rates, kernels.fill_slots)
    done: set[tuple[str, int]] = set()
    for budget in BUDGETS:
        for way in WAYS:
            settings = _settings(way, manifest, budget, fake=rig.fake)
            # A budget that holds everything is the same as a larger one.
            key = (way.name, min(settings.cache_bytes or 0, manifest.expert_bytes))
            if key in done or (rig.fake and budget != BUDGETS[1]):
                continue
            if way.once and budget != BUDGETS[1]:
                continue
            done.add(key)
            title = f"{shape}, {way.name}, {_shown(settings.cache_bytes, manifest)}"
            try:
                rig.need(15)
                rig.say(title)
                yield from decoder.figures(title, way, settings)
            except OutOfTimeError:
                raise
            except (ExpertdError, RuntimeError) as error:
                rig.say(f"{title}: failed: {str(error).splitlines()[0]}")


def _settings(way: Way, manifest: Manifest, budget: int, *, fake: bool) -> DeviceSettings:
    settings = DeviceSettings(cache_bytes=budget, on_miss=OnMiss.COPY)
    settings = replace(settings, **way.settings)
    if way.no_cache:
        room = max(layer.experts_per_token for layer in manifest.layers)
        return replace(settings, cache_bytes=room * manifest.max_record_bytes)
    if fake:
        # Less than all, so that something is copied.
        least = manifest.working_set_bytes // manifest.max_record_bytes
        slots = max(2 * least, least + settings.num_staging)
        return replace(settings, cache_bytes=slots * manifest.max_record_bytes)
    return settings


def _shown(cache_bytes: int | None, manifest: Manifest) -> str:
    if cache_bytes is not None and cache_bytes >= manifest.expert_bytes:
        return "all cached"
    return f"{(cache_bytes or 0) / 2**30:.1f} GiB"


class _Decoder:
    """Decodes the same tokens in every way."""

    def __init__(
        self,
        rig: Rig,
        manifest: Manifest,
        session: Session,
        trunk: TrunkModel,
        routing: Routing,
        rates: Rates,
        fill: Any,  # noqa: ANN401 - as kernels.reference.fill_slots
    ) -> None:
        self._rig, self._manifest, self._session = rig, manifest, session
        self._trunk, self._routing, self._rates, self._fill = trunk, routing, rates, fill
        self._forward = trunk.model.forward
        self._trunk_bytes = sum(
            tensor.nbytes
            for name, tensor in (*trunk.model.named_parameters(), *trunk.model.named_buffers())
            if "embed_tokens" not in name
        )

    @torch.no_grad()
    def figures(self, title: str, way: Way, settings: DeviceSettings) -> Iterator[Figure]:
        rig, model = self._rig, self._trunk.model
        device = rig.open_device(staged=way.staged)
        group = None
        try:
            group = DeviceGroup(
                self._manifest,
                self._session,
                Recovery(self._session, reattach_seconds=0, say=rig.say),
                settings,
                dict.fromkeys((layer.layer for layer in self._manifest.layers), device),
                fill=self._fill,
            )
            model.forward = self._forward
            group.connect(model, self._trunk.experts, self._manifest, rig.say)
            counter = _replay(self._trunk, self._routing, device.torch_device)
            if settings.layers_guessed:
                routers = _guessing(self._trunk, self._routing, counter)
                for runner in group.runners:
                    runner.speculate(routers, group._runners)
            cache = DecodeCache(model.config, WARM_TOKENS + TOKENS + 16)
            where = device.torch_device
            ids = torch.arange(4, device=where)[None]
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            token = torch.zeros(1, 1, dtype=torch.int64, device=where)
            seconds: list[float] = []
            num_tokens = 4 if rig.fake else TOKENS
            before = group.stats
            counter.zero_()
            for number in range((3 if rig.fake else WARM_TOKENS) + num_tokens):
                if number == (3 if rig.fake else WARM_TOKENS):
                    before = group.stats
                device.mark().wait()
                begin = device.clock()
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                (token_on_host,) = device.to_host(logits[:, -1].argmax(-1, keepdim=True))
                seconds.append(device.clock() - begin)
                token.copy_(token_on_host)
                counter.add_(1)
            moved = group.stats.since(before)
        finally:
            model.forward = self._forward
            if group is None:
                device.close()
            else:
                group.close()
        seconds = seconds[-num_tokens:]
        per_token = sum(seconds) / num_tokens
        copied = moved.bytes_copied / num_tokens
        read = self._trunk_bytes + self._manifest.working_set_bytes
        bound = max(copied / self._rates.link, read / self._rates.memory)
        hits = moved.device_hits + moved.prefetch_useful
        uses = max(1, hits + moved.host_hits + moved.nvme_misses)
        note = f"{title}: {hits / uses:.0%} hits, {copied / 1e6:.0f} MB a token"
        is_best = way.name in {"full", "segments", "whole"}
        yield compared(
            PART,
            note,
            "tokens/s",
            [(1 / per_token, 1 / bound)],
            at_least=GOAL_OF_BOUND if is_best else None,
        )
        if way.name == "no cache":
            rate = copied / per_token
            yield compared(
                PART,
                f"{title}: copies while misses last",
                "GB/s",
                [(rate / 1e9, self._rates.link / 1e9)],
                at_least=GOAL_OF_LINK,
            )
        if is_best and "30b-a3b" in title and "all cached" in title:
            yield counted(
                PART, f"{title}: the goal", "tokens/s", [1 / per_token], at_least=GOAL_CACHED
            )


class _Replayed:
    """Before a runner: the experts are those that the counter's row says."""

    def __init__(self, runner: Any, rows: Tensor, counter: Tensor) -> None:  # noqa: ANN401
        self._runner, self._rows, self._counter = runner, rows, counter

    def run(
        self,
        layer: int,
        spec: Any,  # noqa: ANN401
        num_experts: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        if len(hidden) == 1:
            # On the device, so that a recorded step has other experts each time.
            top_k_index = self._rows.index_select(0, self._counter)
        result: Tensor = self._runner.run(
            layer, spec, num_experts, hidden, top_k_index, top_k_weights
        )
        return result


class _Guesses:
    """In the place of a router that is asked ahead of time: right as often as real ones are."""

    def __init__(self, rows: Tensor, counter: Tensor) -> None:  # [tokens, k]
        self._rows, self._counter = rows, counter

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:  # [num]
        return self._rows.index_select(0, self._counter)[0, :num]


def _guessing(trunk: TrunkModel, routing: Routing, counter: Tensor) -> dict[int, Any]:
    chance = torch.Generator().manual_seed(1)
    tokens, _, k = routing.experts.shape
    num_experts = int(routing.experts.max()) + 1
    routers = {}
    for place, layer in enumerate(sorted(trunk.experts)):
        rows = routing.experts[:, place].clone()
        wrong = torch.rand(tokens, k, generator=chance) > GUESSED_RIGHT
        rows[wrong] = torch.randint(num_experts, (int(wrong.sum()),), generator=chance)
        routers[layer] = _Guesses(rows.to(counter.device), counter)
    return routers


def _replay(trunk: TrunkModel, routing: Routing, where: torch.device) -> Tensor:
    """Lets the experts be those of the routing; its counter, int64 [1], is the token's number."""
    counter = torch.zeros(1, dtype=torch.int64, device=where)
    modules: Mapping[int, Any] = trunk.experts
    for place, layer in enumerate(sorted(modules)):
        module = modules[layer]
        runner, *rest = module._expertd
        rows = routing.experts[:, place].contiguous().to(where)
        module._expertd = (_Replayed(runner, rows, counter), *rest)
    return counter
