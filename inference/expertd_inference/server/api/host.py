"""``/host/state``: what the page at ``/host`` shows, each second anew."""

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import expertstore
from expertd_inference.server.front import front_of
from expertd_inference.server.hosting.catalog import Catalog
from expertd_inference.server.hosting.engine_seat import EngineSeat
from expertstore.errors import ExpertdError
from expertstore.v1 import expert_store_pb2 as pb

DAEMON_SECONDS = 2.0
"""A daemon that does not answer within this time is away."""


class EngineState(msgspec.Struct):
    """One of a model's engines; ``pid`` is None while there is none.

    Counts are since the server's start and ``rows_per_step`` is their mean, as is
    ``experts_per_row``, of a MoE layer; ``kv_used`` is the
    share of ``kv_tokens``, 0 to 1, that is taken.
    """

    place: str
    pid: int | None
    deaths: int
    executor: str | None = None
    reason: str | None = None
    running: int = 0
    waiting: int = 0
    steps: int = 0
    rows: int = 0
    rows_per_step: float = 0.0
    experts_per_row: float = 0.0
    kv_tokens: int = 0
    kv_used: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class ModelState(msgspec.Struct):
    """A model: the tokens that its engines have generated since the server's start."""

    name: str
    tokens: int
    engines: list[EngineState]


class LayerHeat(msgspec.Struct):
    """Of one layer: each expert's heat, 0 to 255, and whether it is in RAM."""

    layer: int
    heat: list[int]
    resident: list[bool]


class HostState(msgspec.Struct):
    """The answer.

    ``time`` is in seconds of a clock that only goes forward. ``daemon`` is what
    :meth:`expertd_client.AsyncClient.stats` returns; while the daemon is away it is null, and
    ``away`` says why. ``heat`` is that of the model named in the query's ``heat``.
    """

    version: str
    time: float
    models: list[ModelState]
    daemon: dict[str, Any] | None
    away: str | None
    heat: list[LayerHeat] | None


async def host_state(request: Request) -> Response:
    """``GET /host/state?heat=MODEL``."""
    catalog = front_of(request).catalog
    daemon: dict[str, Any] | None = None
    heat: list[LayerHeat] | None = None
    away: str | None = None
    try:
        async with asyncio.timeout(DAEMON_SECONDS):
            daemon, heat = await _ask(catalog, request.query_params.get("heat"))
    except TimeoutError:
        away = f"The daemon has not answered within {DAEMON_SECONDS:g} s."
    except ExpertdError as error:
        away = str(error)
    models = [
        ModelState(hosted.name, hosted.num_tokens, [_engine(seat) for seat in hosted.seats])
        for hosted in sorted(catalog.loaded, key=lambda one: one.name)
    ]
    state = HostState(expertstore.__version__, time.monotonic(), models, daemon, away, heat)
    return Response(
        msgspec.json.encode(state),
        headers={"Cache-Control": "no-store"},
        media_type="application/json",
    )


async def _ask(
    catalog: Catalog, heat_of: str | None
) -> tuple[dict[str, Any], list[LayerHeat] | None]:
    await catalog.entries()  # Models that the daemon has loaded since get their line.
    daemon = await catalog.client.stats()
    if heat_of is None or heat_of not in {model["name"] for model in daemon["models"]}:
        return daemon, None
    return daemon, _layers(await catalog.client.get_heat(heat_of))


def _layers(response: pb.GetHeatResponse) -> list[LayerHeat]:
    layers, start = [], 0
    for layer in response.layers:
        end = start + layer.num_experts
        resident = [bool(response.resident[at // 8] >> at % 8 & 1) for at in range(start, end)]
        layers.append(LayerHeat(layer.layer, [*response.heat[start:end]], resident))
        start = end
    return layers


def _engine(seat: EngineSeat) -> EngineState:
    state = EngineState(seat.spec.place, seat.pid, seat.num_deaths)
    stats = seat.total_stats
    if stats is None:
        state.waiting = len(seat.sequences)
        return state
    state.executor, state.reason = stats.executor, stats.reason
    state.running, state.waiting = stats.num_running, stats.num_waiting
    state.steps, state.rows, state.rows_per_step = stats.num_steps, stats.num_rows, stats.rows_mean
    state.experts_per_row = stats.experts_mean
    state.kv_tokens, state.kv_used = stats.kv_tokens, stats.kv_used
    state.prefix_queries, state.prefix_hits = stats.prefix_queries, stats.prefix_hits
    state.preemptions = stats.num_preemptions
    return state
