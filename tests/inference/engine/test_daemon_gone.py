"""Streams of many sequences when the daemon dies under them, is replaced, or drops the model."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_client import Client
from expertd_inference import GenerationSettings, Worker
from expertd_inference.engine.stream import TokenStream
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import Daemon, serving
from expertstore.errors import NotFoundError, PreconditionError, UnavailableError
from expertstore.pack.manifest import read_manifest

Make = Callable[..., Any]

SETTINGS = GenerationSettings(max_new_tokens=60, ignore_eos=True)
PROMPTS = [[number + 1] * (7 + 9 * number) for number in range(4)]


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="expertd-") as directory:
        yield Path(directory) / "s"


def begun(worker: Worker) -> list[TokenStream]:
    """Streams that have their first token."""
    streams = [worker.engine.submit(prompt, SETTINGS) for prompt in PROMPTS]
    for stream in streams:
        next(stream)
    return streams


def rest(streams: list[TokenStream]) -> list[list[int]]:
    return [[token.id for token in stream] for stream in streams]


def test_all_go_on_with_the_next_daemon(packed: Make, socket: Path) -> None:
    pack = packed("qwen3_moe")
    ram = read_manifest(pack).manifest.working_set_bytes
    said: list[str] = []
    with (
        serving({"m": pack}, ram=ram, socket=socket) as daemon,
        Worker(attach("m", socket), say=said.append) as worker,
    ):
        expected = rest(begun(worker))
        streams = begun(worker)
        daemon.kill()
        successor = Daemon({"m": pack}, ram=ram, socket=socket)
        try:
            assert rest(streams) == expected
        finally:
            successor.close()
    assert said == ["daemon gone, waiting to re-attach", "re-attached"]


def test_each_is_told_when_none_comes_back(packed: Make, socket: Path) -> None:
    pack = packed("mixtral")
    with serving({"m": pack}, socket=socket) as daemon:
        worker = Worker(attach("m", socket), say=lambda _: None, reattach_seconds=0.2)
        expected = rest(begun(worker))
        streams = begun(worker)
        daemon.kill()
        for stream in streams:
            with pytest.raises(UnavailableError, match=r"none came back within 0\.2 s"):
                list(stream)
    with serving({"m": pack}, socket=socket), worker:
        assert rest(begun(worker)) == expected, "the engine is as good as before"


def test_each_is_told_when_the_model_is_unloaded(packed: Make, socket: Path) -> None:
    pack = packed("mixtral")
    ram = read_manifest(pack).manifest.working_set_bytes
    with (
        serving({"m": pack, "other": packed("olmoe")}, ram=8 * ram, socket=socket) as daemon,
        Worker(attach("m", socket), say=lambda _: None, reattach_seconds=0.2) as worker,
    ):
        streams = begun(worker)
        with Client(daemon.socket) as client:
            client.unload_model("m")
        for stream in streams:
            # It is being unloaded, or has been.
            with pytest.raises((NotFoundError, PreconditionError), match="m"):
                list(stream)
