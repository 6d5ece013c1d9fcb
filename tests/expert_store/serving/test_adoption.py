"""A daemon dies and the next one takes its arena over, under the stand-in for systemd."""

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from expertd_client import Client, ExpertdError, Session, SessionLostError
from expertd_client.mapping import Mapping
from expertd_testing.handmade import PAGE, make_pack, record
from expertd_testing.supervised import Supervised, supervised
from expertd_testing.watching import assert_serves, eventually, expertd
from expertstore.shared.arena_trailer import TRAILER_BYTES
from expertstore.shared.directory import EPOCH_WORD, HEADER_WORDS, directory_bytes, pack_word
from tests.expert_store.serving.conftest import RECORD_BYTES

NUM_EXPERTS = 24
ALL = 64 * RECORD_BYTES
EVERY = [(layer, expert) for layer in range(3) for expert in range(8)]


@contextmanager
def attached(service: Supervised, model: str = "m") -> Iterator[Session]:
    with Client(service.socket, timeout_seconds=10) as store, store.attach(model) as session:
        yield session


def stats(service: Supervised) -> dict[str, Any]:
    with Client(service.socket, timeout_seconds=10) as store:
        return store.stats()


def model_stats(service: Supervised, name: str = "m") -> dict[str, Any]:
    (found,) = [model for model in stats(service)["models"] if model["name"] == name]
    return dict(found)


def use_all(session: Session, seed: int = 0) -> None:
    """Every expert, and every byte of it."""
    for layer in range(3):
        for lease in session.waves(layer, range(8)):
            with lease:
                for expert, view in zip(lease.experts, lease.views, strict=True):
                    assert bytes(view) == record(layer, expert, RECORD_BYTES, seed)


def warm_up(service: Supervised, model: str = "m", seed: int = 0) -> None:
    with attached(service, model) as session:
        use_all(session, seed)


def die(service: Supervised, meanwhile: Callable[[], object] | None = None) -> None:
    """kill -9; the next daemon serves when this returns. ``meanwhile`` there is none."""
    starts = len(service.runs)
    with service.holding_restarts():
        run = service.kill()
        service.wait_ended(run)
        if meanwhile is not None:
            meanwhile()
    service.wait_ready(starts=starts + 1)


@contextmanager
def stored(service: Supervised, name: str) -> Iterator[mmap.mmap]:
    """Writable, what the fd store holds under that name."""
    (fd,) = service.stored(name)
    with mmap.mmap(fd, os.fstat(fd).st_size) as mapped:
        os.close(fd)
        yield mapped


def test_the_next_daemon_serves_warm(pack: Path) -> None:
    with supervised({"m": pack}, ram=ALL) as service, attached(service) as session:
        assert service.stored_names == ["arena", "directory-0"]
        use_all(session)
        address, before = session.arena_address, session.incarnation
        held = session.acquire(0, [3])
        die(service)
        eventually(lambda: not session.connected)
        # What is mapped stays what it is, and the step that runs is finished.
        assert bytes(held.views[0]) == record(0, 3)
        held.release()
        session.reattach(10)
        assert session.incarnation != before
        assert session.arena_address == address
        use_all(session)
        told = model_stats(service)
        assert told["nvme_bytes_read"] == told["nvme_misses"] == 0
        assert (told["adopted_records"], told["dropped_records"]) == (NUM_EXPERTS, 0)
        assert told["adopted_bytes"] == NUM_EXPERTS * RECORD_BYTES
        assert stats(service)["adoptions"] == 1
        assert "took over 24 records, dropped 0" in service.output
        assert service.stored_names == ["arena", "directory-0"]


def test_systemctl_restart_is_warm_and_stop_is_not(pack: Path) -> None:
    with supervised({"m": pack}, ram=ALL) as service:
        warm_up(service)
        assert service.restart().exit_status == 0
        service.wait_ready(starts=2)
        warm_up(service)
        assert model_stats(service)["nvme_bytes_read"] == 0
        service.stop()
        assert service.stored_names == []


@pytest.mark.parametrize("options", [{"max_stored": 0}, {"max_stored": 0, "says_max": False}])
def test_without_an_fd_store_the_next_one_starts_cold(pack: Path, options: dict[str, Any]) -> None:
    with supervised({"m": pack}, ram=ALL, **options) as service, attached(service) as session:
        use_all(session)
        die(service)
        session.reattach(10)
        use_all(session)
        assert model_stats(service)["nvme_bytes_read"] == NUM_EXPERTS * RECORD_BYTES


def test_a_directory_that_did_not_fit_in_the_store(pack: Path, tmp_path: Path) -> None:
    """Its workers cannot be seen by the next daemon, which reuses what they read."""
    other = make_pack(tmp_path / "other", seed=1)
    with (
        supervised({"m": pack, "n": other}, ram=48 * RECORD_BYTES, max_stored=2) as service,
        attached(service, "n") as sleeper,
    ):
        assert "raise FileDescriptorStoreMax" in service.output
        assert service.stored_names == ["arena", "directory-0"]
        use_all(sleeper, seed=1)
        held = sleeper.acquire(0, [0])
        die(service)
        assert model_stats(service, "n")["adopted_records"] == 0
        warm_up(service, "m")
        warm_up(service, "n", seed=1)
        with pytest.raises(SessionLostError):
            held.release()


def test_a_flipped_byte_costs_its_record(pack: Path) -> None:
    with supervised({"m": pack}, ram=ALL) as service, attached(service) as session:
        use_all(session)
        with session.acquire(1, [5]) as lease:
            offset = lease.offsets[0]

        def flip() -> None:
            with stored(service, "arena") as arena:
                arena[offset + 77] ^= 4

        die(service, flip)
        told = model_stats(service)
        assert (told["adopted_records"], told["dropped_records"]) == (NUM_EXPERTS - 1, 1)
        assert "record dropped model=m layer=1 expert=5" in service.output
        session.reattach(10)
        use_all(session)
        assert model_stats(service)["nvme_bytes_read"] == RECORD_BYTES


WORD = HEADER_WORDS + 8 + 5  # of layer 1, expert 5


@pytest.mark.parametrize(
    ("word", "value", "dropped"),
    [
        pytest.param(WORD, pack_word(1 << 40, 1), 1, id="outside the arena"),
        pytest.param(WORD, pack_word(ALL - PAGE, 1), 1, id="half outside"),
        pytest.param(WORD, pack_word(ALL // 2, 1), 1, id="free room"),
        pytest.param(WORD, "another's", 1, id="another record"),
        pytest.param(WORD, "shifted", 1, id="half of another record"),
        pytest.param(WORD, 1 << 63, 1, id="a generation, and no page"),
        pytest.param(0, 0, None, id="magic"),
        pytest.param(1, 9, None, id="version"),
        pytest.param(3, NUM_EXPERTS - 1, None, id="fewer entries"),
        pytest.param(3, 1 << 62, None, id="many entries"),
        pytest.param(directory_bytes(NUM_EXPERTS) // 8, 1 << 50, None, id="length"),
        pytest.param(directory_bytes(NUM_EXPERTS) // 8 + 1, 5, None, id="checksum"),
        pytest.param(directory_bytes(NUM_EXPERTS) // 8 + 4, 5, None, id="description"),
    ],
)
def test_damage_in_a_directory(pack: Path, word: int, value: int | str, dropped: int) -> None:
    with supervised({"m": pack}, ram=ALL) as service:
        warm_up(service)

        def damage() -> None:
            with stored(service, "directory-0") as raw, memoryview(raw) as view:
                words = view.cast("Q")
                number = value
                if number == "another's":
                    number = words[HEADER_WORDS]
                elif number == "shifted":
                    number = words[HEADER_WORDS] + 1
                words[word] = number
                words.release()

        die(service, damage)
        told = model_stats(service)
        assert told["dropped_records"] == (dropped or 0)
        assert told["adopted_records"] == (0 if dropped is None else NUM_EXPERTS - dropped)
        warm_up(service)
        lost = NUM_EXPERTS - told["adopted_records"]
        assert model_stats(service)["nvme_bytes_read"] == lost * RECORD_BYTES
        assert service.stored_names.count("arena") == 1
        assert len(service.stored_names) == 2


def test_damage_in_the_trailer_is_a_cold_start(pack: Path) -> None:
    with supervised({"m": pack}, ram=ALL) as service:
        warm_up(service)

        def damage() -> None:
            with stored(service, "arena") as arena:
                arena[-TRAILER_BYTES] ^= 1

        die(service, damage)
        warm_up(service)
        assert model_stats(service)["nvme_bytes_read"] == NUM_EXPERTS * RECORD_BYTES
        assert service.stored_names == ["arena", "directory-0"]
        die(service)
        assert model_stats(service)["adopted_records"] == NUM_EXPERTS


def test_another_pack_at_the_same_path(tmp_path: Path) -> None:
    path = make_pack(tmp_path / "pack")
    with supervised({"m": path}, ram=ALL) as service:
        warm_up(service)

        def replace() -> None:
            path.rename(tmp_path / "old")
            make_pack(path, seed=1)

        die(service, replace)
        assert model_stats(service)["adopted_records"] == 0
        assert "is not what it was" in service.output
        warm_up(service, seed=1)


def test_another_budget_is_a_cold_start(pack: Path) -> None:
    with supervised({"m": pack}, ram=ALL) as service, attached(service) as session:
        use_all(session)
        held = session.acquire(0, [0])
        with stored(service, "arena") as old:
            die(service, lambda: service.next_start(ram=2 * ALL))
            assert not any(old[:ALL])  # its RAM was given back, though a worker maps it
        assert "the budget is now" in service.output
        with pytest.raises(SessionLostError):
            held.release()
        session.reattach(10)
        assert session.arena_bytes == 2 * ALL
        use_all(session)
        assert service.stored_names == ["arena", "directory-0"]


def test_models_loaded_at_run_time_come_back(pack: Path, tmp_path: Path) -> None:
    late, moved = make_pack(tmp_path / "late", seed=1), make_pack(tmp_path / "moved", seed=2)
    with supervised({"m": pack}, ram=2 * ALL) as service:
        for name, path in (("late", late), ("moved", moved), ("gone", pack)):
            options = ("--min", "16KiB", "--pin", "1:*", "--disk-io", "mmap")
            given = options if name == "late" else ()
            assert expertd("load", name, path, "--socket", service.socket, *given).returncode == 0
        for name, seed in (("late", 1), ("moved", 2), ("gone", 0)):
            warm_up(service, name, seed)
        assert expertd("unload", "gone", "--socket", service.socket).returncode == 0
        die(service, lambda: moved.rename(tmp_path / "elsewhere"))
        assert {model["name"] for model in stats(service)["models"]} == {"m", "late"}
        assert "model not adopted model=moved" in service.output
        warm_up(service, "late", 1)
        told = model_stats(service, "late")
        assert told["nvme_bytes_read"] == 0
        assert (told["min_bytes"], told["num_pinned"]) == (16 << 10, 8)
        assert (told["disk"]["asked"], told["disk"]["way"]) == ("mmap", "mmap")
        assert sorted(service.stored_names)[0] == "arena"
        assert len(service.stored_names) == 3


def test_a_model_that_the_settings_name_no_more_goes(pack: Path, tmp_path: Path) -> None:
    other = make_pack(tmp_path / "other", seed=1)
    with supervised({"m": pack, "n": other}, ram=ALL) as service:
        warm_up(service, "n", seed=1)

        def forget() -> None:
            index = service.command.index(f"n={other}")
            del service.command[index - 1 : index + 1]

        die(service, forget)
        assert [model["name"] for model in stats(service)["models"]] == ["m"]
        assert stats(service)["arena"]["bytes_used"] == 0
        assert len(service.stored_names) == 2


def test_a_model_under_another_path(pack: Path, tmp_path: Path) -> None:
    other = make_pack(tmp_path / "other", seed=1)
    with supervised({"m": pack}, ram=ALL) as service:
        warm_up(service)
        die(service, lambda: service.next_start(model=f"m={other}"))
        assert "it was of another pack" in service.output
        warm_up(service, seed=1)
        assert len(service.stored_names) == 2


def test_a_worker_that_slept_through_two_restarts(pack: Path) -> None:
    with supervised({"m": pack}, ram=ALL) as service, attached(service) as sleeper:
        use_all(sleeper)
        held = sleeper.acquire(2, [1, 2])
        die(service)
        warm_up(service)
        die(service)
        warm_up(service)
        # Nothing was reused: it has lost nothing.
        assert bytes(held.views[1]) == record(2, 2)
        held.release()
        assert stats(service)["adoptions"] == 2
        sleeper.reattach(10)
        use_all(sleeper)


def test_two_adoptions_before_the_first_reuse(pack: Path) -> None:
    """The second daemon's session, too, is of another than the third."""
    with supervised({"m": pack}, ram=12 * RECORD_BYTES) as service:
        with attached(service) as session:
            session.acquire(0, range(8)).release()
        die(service)
        with attached(service) as sleeper:
            held = sleeper.acquire(0, range(8))
            die(service)
            with attached(service) as session:
                session.acquire(0, range(8)).release()
                assert model_stats(service)["nvme_bytes_read"] == 0
                use_all(session)  # more than there is room for
            assert held.views[0] is not None
            with pytest.raises(SessionLostError, match="another daemon has taken over"):
                held.release()


SLEEPER = """
import sys
from expertd_client import Client, SessionLostError
from expertd_testing.handmade import record

session = Client(sys.argv[1], timeout_seconds=10).attach("m")
lease = session.acquire(0, range(6))
print("holding", flush=True)
sys.stdin.readline()
wrong = [e for e, view in enumerate(lease.views) if bytes(view) != record(0, e)]
try:
    lease.release()
    print("released", wrong, flush=True)
except SessionLostError:
    print("lost", wrong, flush=True)
session.reattach(10)
with session.acquire(0, [1]) as lease:
    assert bytes(lease.views[0]) == record(0, 1)
print("again", flush=True)
"""


@pytest.mark.parametrize("reused", [False, True])
def test_a_stopped_worker_whose_bytes_were_reused(pack: Path, reused: bool) -> None:
    from expertd_testing.watching import python

    with supervised({"m": pack}, ram=6 * RECORD_BYTES) as service:
        process = python(SLEEPER, service.socket)
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        process.send_signal(signal.SIGSTOP)
        die(service)
        if reused:
            with attached(service) as session:
                session.acquire(1, range(6)).release()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate("\n", timeout=30)
        assert process.returncode == 0, err
        first, again = out.splitlines()
        assert again == "again"
        assert first == ("lost [0, 1, 2, 3, 4, 5]" if reused else "released []")


def test_the_check_is_what_finds_it(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the trailer the same worker would use reused bytes."""
    monkeypatch.setattr(Mapping, "is_void", property(lambda mapping: mapping._page.revoked))
    with supervised({"m": pack}, ram=6 * RECORD_BYTES) as service, attached(service) as sleeper:
        held = sleeper.acquire(0, range(6))
        die(service)
        with attached(service) as session:
            session.acquire(1, range(6)).release()
        assert bytes(held.views[0]) != record(0, 0)
        held.release()


def test_the_epoch_goes_on(pack: Path) -> None:
    with supervised({"m": pack}, ram=6 * RECORD_BYTES) as service:
        warm_up(service)
        with stored(service, "directory-0") as raw, memoryview(raw) as view:
            epoch = view.cast("Q")[EPOCH_WORD]
        assert epoch > 1
        die(service)
        with stored(service, "directory-0") as raw, memoryview(raw) as view:
            assert view.cast("Q")[EPOCH_WORD] == epoch
        warm_up(service)


def test_the_watchdogs_victim_is_inherited(pack: Path) -> None:
    with (
        supervised({"m": pack}, ram=ALL, watchdog_seconds=1.0) as service,
        attached(service) as session,
    ):
        use_all(session)
        run = service.kill(signal.SIGSTOP)
        service.wait_ready(starts=2)
        assert run.timed_out
        session.reattach(10)
        use_all(session)
        assert model_stats(service)["nvme_bytes_read"] == 0


def test_twenty_kills_at_random_moments(pack: Path, tmp_path: Path) -> None:
    """While workers fetch more than fits, and an administrator loads and unloads."""
    other = make_pack(tmp_path / "other", seed=1)
    chance = random.Random(5)
    stop = threading.Event()
    failures: list[BaseException] = []
    rounds = [0, 0, 0]

    with supervised({"m": pack}, ram=15 * RECORD_BYTES) as service:

        def work(number: int) -> None:
            mine = random.Random(number)
            try:
                with attached(service) as session:
                    while not stop.is_set():
                        try:
                            layer, experts = mine.randrange(3), mine.sample(range(8), 3)
                            with session.acquire(layer, experts) as lease:
                                read = [bytes(view) for view in lease.views]
                            for expert, data in zip(experts, read, strict=True):
                                assert data == record(layer, expert, RECORD_BYTES)
                            rounds[number] += 1
                        except ExpertdError:
                            session.reattach(20)
            except BaseException as error:
                failures.append(error)

        def administer() -> None:
            with Client(service.socket, timeout_seconds=20) as store:
                while not stop.is_set():
                    with suppress(ExpertdError):
                        store.load_model("n", other)
                    with suppress(ExpertdError), store.attach("n") as session:
                        session.acquire(0, [1, 2]).release()
                    with suppress(ExpertdError):
                        store.unload_model("n")
                    rounds[2] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        threads.append(threading.Thread(target=administer))
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                time.sleep(chance.uniform(0, 0.15))
                die(service)
                assert not failures
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert not failures, failures
        assert all(rounds)
        assert stats(service)["adoptions"] == 20
        assert_serves(service.socket)
        assert "Traceback" not in service.output
