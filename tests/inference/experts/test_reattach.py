"""The daemon is killed while a worker generates."""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_client import Client, attachment
from expertd_inference.kernels.cpu import reference
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.process.attachment import attach
from expertd_inference.worker import Worker
from expertd_testing.daemon import Daemon, serving
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.supervised import supervised
from expertd_testing.watching import eventually
from expertstore.errors import UnavailableError
from expertstore.pack.manifest import read_manifest
from tests.client.observing import num_arenas
from tests.inference.greedy import greedy, prompt_of
from tests.inference.worker_process import WorkerProcess

Make = Callable[..., Any]


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="expertd-") as directory:
        yield Path(directory) / "s"


class KillAfter:
    """A streamer that calls ``action`` when so many tokens have come."""

    def __init__(self, num_tokens: int, action: Callable[[], None]) -> None:
        self.num_tokens = num_tokens
        self.action = action

    def put(self, value: Any) -> None:
        self.num_tokens -= 1
        if self.num_tokens == 0:
            self.action()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("when", ["between steps", "within a step"])
@pytest.mark.parametrize("budget", ["all", "least"])
def test_goes_on_with_the_next_daemon(
    budget: str,
    when: str,
    packed: Make,
    stock: Make,
    socket: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack = packed("qwen3_moe")
    manifest = read_manifest(pack).manifest
    ram = manifest.expert_bytes if budget == "all" else manifest.working_set_bytes
    prompt = prompt_of(30, seed=1)
    expected = greedy(stock("qwen3_moe"), prompt, 24)
    said: list[str] = []
    successors: list[Daemon] = []
    num_waves = 0

    def replace() -> None:
        daemon.kill()
        successors.append(Daemon({"m": pack}, ram=ram, socket=socket))

    def fill_slots(*args: Any, **kwargs: Any) -> None:
        nonlocal num_waves
        num_waves += 1
        if num_waves == 20:
            # It holds a lease, and needs others before the step is done.
            replace()
        reference.fill_slots(*args, **kwargs)

    if when == "within a step":
        monkeypatch.setattr(ReferenceKernels, "fill_slots", staticmethod(fill_slots))
    with serving({"m": pack}, ram=ram, socket=socket) as daemon:
        worker = Worker(attach("m", socket), say=said.append)
        streamer = KillAfter(8 if when == "between steps" else 1000, replace)
        try:
            generated = generate(worker, prompt, 24, streamer)
            assert len(successors) == 1
            assert generated == expected
            assert said == ["daemon gone, waiting to re-attach", "re-attached"]
            assert worker.session.connected
            with Client(socket) as client:
                assert len(attached(client)) == 1, "the worker is the new daemon's"
        finally:
            worker.close()
            for successor in successors:
                successor.close()


@pytest.mark.parametrize("when", ["while it generates", "before its next step"])
def test_goes_on_after_it_has_let_go_of_the_old_arena(
    when: str, packed: Make, stock: Make, socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cold start of the next daemon takes longer than the memory of the old one is kept."""
    monkeypatch.setattr(attachment, "KEEP_SECONDS", 0.2)
    pack = packed("qwen3_moe")
    ram = read_manifest(pack).manifest.working_set_bytes
    prompt = prompt_of(30, seed=1)
    expected = greedy(stock("qwen3_moe"), prompt, 24)
    successors: list[threading.Thread] = []
    done = threading.Event()

    def succeed() -> None:
        deadline = time.monotonic() + 10
        while num_arenas() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert num_arenas() == 0
        with serving({"m": pack}, ram=ram, socket=socket):
            done.wait(60)

    def replace() -> None:
        daemon.kill()
        successors.append(threading.Thread(target=succeed))
        successors[0].start()

    with serving({"m": pack}, ram=ram, socket=socket) as daemon:
        worker = Worker(attach("m", socket), say=lambda _: None)
        try:
            if when == "before its next step":
                assert generate(worker, prompt, 24, KillAfter(24, replace)) == expected
                deadline = time.monotonic() + 10
                while num_arenas() and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert greedy(worker.model, prompt, 24) == expected
            else:
                assert generate(worker, prompt, 24, KillAfter(8, replace)) == expected
            assert num_arenas() == 1
        finally:
            done.set()
            for thread in successors:
                thread.join()
            worker.close()


@pytest.mark.parametrize("budget", ["all", "least"])
def test_goes_on_in_the_same_arena(budget: str, packed: Make, stock: Make) -> None:
    """Under a service manager the next daemon has what the worker needs in RAM."""
    pack = packed("qwen3_moe")
    manifest = read_manifest(pack).manifest
    ram = manifest.expert_bytes if budget == "all" else manifest.working_set_bytes
    prompt = prompt_of(30, seed=1)
    expected = greedy(stock("qwen3_moe"), prompt, 24)
    with (
        supervised({"m": pack}, ram=ram) as service,
        Worker(attach("m", service.socket), say=lambda _: None) as worker,
    ):
        assert greedy(worker.model, prompt, 24) == expected
        address = worker.session.arena_address
        assert generate(worker, prompt, 24, KillAfter(8, service.kill)) == expected
        assert len(service.runs) == 2
        assert worker.session.arena_address == address
        with Client(service.socket) as client:
            stats = client.stats()
        assert stats["adoptions"] == 1
        if budget == "all":
            assert stats["models"][0]["nvme_bytes_read"] == 0


def generate(worker: Worker, prompt: list[int], new: int, streamer: Any) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    out = worker.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=streamer,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_gives_up_after_reattach_seconds(packed: Make, socket: Path) -> None:
    pack = packed("mixtral")
    said: list[str] = []
    with serving({"m": pack}, socket=socket) as daemon:
        worker = Worker(attach("m", socket), say=said.append, reattach_seconds=0.6)
        begin = 0.0

        def kill() -> None:
            nonlocal begin
            daemon.kill()
            begin = time.monotonic()

        with pytest.raises(UnavailableError, match=r"none came back within 0\.6 s"):
            generate(worker, prompt_of(10), 24, KillAfter(4, kill))
        assert 0.5 < time.monotonic() - begin < HANG_SECONDS  # and not the default 30
        assert said == ["daemon gone, waiting to re-attach"]
        worker.close()


def test_a_model_survives_its_failure(packed: Make, stock: Make, socket: Path) -> None:
    # What failed for want of a daemon works again once there is one.
    pack = packed("mixtral")
    prompt = prompt_of(10)
    with serving({"m": pack}, socket=socket):
        worker = Worker(attach("m", socket), say=lambda _: None, reattach_seconds=0.2)
    with pytest.raises(UnavailableError):
        greedy(worker.model, prompt, 8)
    with serving({"m": pack}, socket=socket):
        assert greedy(worker.model, prompt, 8) == greedy(stock("mixtral"), prompt, 8)
        worker.close()


def test_a_worker_that_was_cut_off_repeats(
    packed: Make,
    stock: Make,
    tmp_path: Path,
    processes: list[WorkerProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack = packed("mixtral")
    config = tmp_path / "config.toml"
    config.write_text("stall_seconds = 0.2\n")
    prompt = prompt_of(30, seed=1)
    expected = greedy(stock("mixtral"), prompt, 24)
    other_prompt = prompt_of(30, seed=2)
    said: list[str] = []
    answers: list[dict[str, Any]] = []
    num_calls = 0

    def fill_slots(*args: Any, **kwargs: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 9:
            # Holding a lease of the least budget that serves the model, it waits until
            # another has generated in that: the daemon must have taken the bytes away.
            processes[0].begin(daemon.socket, "m", other_prompt, 8)
            answers.append(processes[0].answer())
        reference.fill_slots(*args, **kwargs)

    monkeypatch.setattr(ReferenceKernels, "fill_slots", staticmethod(fill_slots))
    manifest = read_manifest(pack).manifest
    with (
        serving({"m": pack}, ram=manifest.working_set_bytes, config=config) as daemon,
        Worker(attach("m", daemon.socket), say=said.append) as worker,
    ):
        first = worker.session.id
        # On a busy machine the other may get by beside the lease, in smaller waves.
        for _ in range(5):
            num_calls = 0
            assert greedy(worker.model, prompt, 24) == expected
            if worker.session.id != first:
                break
        assert worker.session.id != first, "it was cut off and attached again"
    others = greedy(stock("mixtral"), other_prompt, 8)
    assert answers
    assert all(answer["tokens"] == others for answer in answers)
    assert said == [], "this is between the daemon and the worker"


def test_a_killed_worker_harms_nobody(packed: Make, stock: Make, processes: Any) -> None:
    pack = packed("mixtral")
    prompt = prompt_of(30, seed=1)
    manifest = read_manifest(pack).manifest
    with serving({"m": pack}, ram=manifest.working_set_bytes) as daemon:
        victim = WorkerProcess()
        try:
            # Once, so that it has imported all it needs when it counts.
            victim.begin(daemon.socket, "m", prompt, 1)
            victim.answer()
            victim.begin(daemon.socket, "m", prompt, 400)
            processes[0].begin(daemon.socket, "m", prompt, 400)
            with Client(daemon.socket) as client:
                deadline = time.monotonic() + 60
                while len(attached(client)) < 2 and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert len(attached(client)) == 2
                time.sleep(0.3)
                victim.signal(signal.SIGKILL)
                eventually(lambda: len(attached(client)) == 1)  # the other's: it still runs
        finally:
            victim.close()
        answer = processes[0].answer()
        assert answer.get("tokens") == greedy(stock("mixtral"), prompt, 400)
        assert answer["said"] == []


def attached(client: Client) -> list[Any]:
    sessions = client.stats()["sessions"]
    assert isinstance(sessions, list)
    return sessions
