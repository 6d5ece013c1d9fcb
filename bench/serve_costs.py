"""What a server costs beside its engine's steps: a part of :mod:`bench.serve`."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.batch import Ours
from bench.figures import Figure, compared, counted
from bench.load_client import LoadClient
from bench.peer import CONTEXT, Peer
from expertd_testing.daemon import serving
from expertd_testing.server import serving_http

STEP_CLIENTS, STEP_GOAL = 16, 1.05
MASKS_GOAL = 1.05
CACHED_GOAL = 0.05
PLACE_GOAL = 2.5
"""Steps: the rest of the one that is computed, that of the next sequence, and the way there."""
START_GOAL = 1.0
FIRST_PROMPT = 16
"""Tokens, as bench/peers/ours.py has them."""
SWITCH_BUDGET = 1.25
"""Of the experts of one of two models."""
IDLE_SECONDS = 0.5


def own_costs(
    what: str,
    options: argparse.Namespace,
    socket: Path,
    client: LoadClient,
    places: int,
    say: Callable[[str], None],
) -> Iterator[Figure]:
    """Of a server of the daemon's model at ``socket``, which computes ``places`` sequences."""
    say("serve: what the server adds to a step")
    yield from _added_to_a_step(what, options, socket, client)
    say("serve: cached prompts")
    yield _cached(what, options, client)
    say("serve: a client that leaves")
    yield counted(
        "serve",
        f"{what}: from one client's leaving to the first token of one that waits",
        "steps",
        [client.steps_to_a_place(places, 400) for _ in range(options.rounds)],
        at_most=PLACE_GOAL,
    )


def _added_to_a_step(
    what: str, options: argparse.Namespace, socket: Path, client: LoadClient
) -> Iterator[Figure]:
    number = STEP_CLIENTS

    def drawn(client_number: int) -> Mapping[str, Any]:
        # The likeliest token of a made-up model may be the same for all within a string, so that
        # a step reads few experts: by chance the texts are of all tokens, with a schema or without.
        return {"temperature": 1.0, "seed": client_number}

    def schema(client_number: int) -> Mapping[str, Any]:
        texts = {"type": "array", "items": {"type": "string"}, "minItems": 1000 + client_number}
        wanted = {"type": "json_object", "schema": texts}
        return {**drawn(client_number), "response_format": wanted}

    def turn(steps: int) -> tuple[float, float, float, float]:
        plain = client.step_seconds(number, CONTEXT, steps)
        free = client.step_seconds(number, CONTEXT, steps, drawn)
        masked = client.step_seconds(number, CONTEXT, steps, schema)
        return plain, free, masked, number / engine.decode(steps, number)

    engine = Ours(socket, 16)
    try:
        turn(2)
        turns = [turn(options.steps) for _ in range(options.rounds)]
    finally:
        engine.close()
    step = f"{what}: a step of {number} sequences"
    yield compared(
        "serve",
        f"{step}, by the server / by an engine in the process",
        "s",
        [(plain, alone) for plain, _, _, alone in turns],
        at_most=STEP_GOAL,
    )
    yield compared(
        "serve",
        f"{step} drawn by chance, each with a JSON schema of its own / without",
        "s",
        [(masked, free) for _, free, masked, _ in turns],
        at_most=MASKS_GOAL,
    )


def _cached(what: str, options: argparse.Namespace, client: LoadClient) -> Figure:
    turns = []
    for _ in range(options.rounds):
        prefix = client.prompt(options.cached_tokens)
        cold = client.first(prefix + client.prompt(16))
        turns.append((client.first(prefix + client.prompt(16)), cold))
    return compared(
        "serve",
        f"{what}: first token after {options.cached_tokens} cached tokens and 16 others / cold",
        "s",
        turns,
        at_most=CACHED_GOAL,
    )


def starts(
    what: str, options: argparse.Namespace, socket: Path, vocabulary: int
) -> Iterator[Figure]:
    """Of a server of the daemon's model and of a worker: until loaded, and the first token.

    A server listens once its engine can compute; a worker makes its engine for its first token.
    """
    loaded, first = [], []
    for _ in range(options.rounds):
        began = time.monotonic()
        with serving_http("--socket", socket, "--threads", str(options.threads)) as server:
            listens = time.monotonic() - began
            client = LoadClient(server.url, vocabulary)
            client.first(client.prompt(FIRST_PROMPT))
            answered = time.monotonic() - began
        job = {"socket": str(socket), "model": "m", "threads": options.threads}
        with Peer("ours", job, python=sys.executable) as worker:
            ready = worker.wait_ready().ready
            loaded.append((listens, ready["loaded"] - worker.started))
            first.append((answered, ready["first"] - worker.started))
    for name, turns in (
        ("until it listens / of a worker until it has loaded", loaded),
        (f"to the first token after {FIRST_PROMPT} / of a worker", first),
    ):
        yield compared(
            "serve",
            f"{what}: from the process's start {name}",
            "s",
            turns,
            at_most=START_GOAL,
        )


def switches(
    what: str,
    options: argparse.Namespace,
    packs: Mapping[str, Path],
    expert_bytes: int,
    vocabulary: int,
) -> Iterator[Figure]:
    """Between two models ``m`` and ``n`` with so many bytes of experts each."""
    with (
        serving(packs, ram=int(expert_bytes * SWITCH_BUDGET)) as daemon,
        serving_http(
            *("--socket", str(daemon.socket), "--threads", str(options.threads)),
            *("--idle-seconds", str(IDLE_SECONDS), "--kv-tokens", "4096"),
        ) as server,
    ):
        clients = {name: LoadClient(server.url, vocabulary, name) for name in packs}
        prompt = clients["m"].prompt(16)
        firsts: dict[str, list[float]] = {"again": [], "switch": []}
        for client in clients.values():
            client.first(prompt)
        for _ in range(options.rounds):
            for client in clients.values():
                for kind in ("switch", "again"):
                    while server.engines:
                        time.sleep(0.05)
                    firsts[kind].append(client.first(prompt))
    limit = f"RAM for {SWITCH_BUDGET:g} of two models' experts"
    for kind, name in (("switch", "the other model"), ("again", "the same model")):
        yield counted(
            "serve",
            f"{what}, {limit}: first token of {name}, whose engine was ended when idle",
            "s",
            firsts[kind],
        )
