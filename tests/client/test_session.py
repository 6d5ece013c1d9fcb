"""Sessions and leases against a real daemon."""

import gc
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from expertd_client import (
    CapacityError,
    Client,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
    RecordLostError,
    Session,
    SessionLostError,
    UnauthenticatedError,
)
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import eventually, num_open_files


def address(view: memoryview) -> int:
    pointer: int = np.frombuffer(view, np.uint8).ctypes.data
    return pointer


def num_sessions(store: Client) -> int:
    sessions = store.stats()["sessions"]
    assert isinstance(sessions, list)
    return len(sessions)


def test_views_are_the_arena_itself(store: Client) -> None:
    with store.attach("m") as session, session.acquire(1, [3, 0, 7]) as lease:
        assert (lease.layer, lease.experts) == (1, (3, 0, 7))
        assert [bytes(view) for view in lease.views] == [record(1, e) for e in (3, 0, 7)]
        for view, offset in zip(lease.views, lease.offsets, strict=True):
            assert view.readonly
            assert address(view) == session.arena_address + offset
            assert 0 <= offset <= session.arena_bytes - len(view)
            with pytest.raises(TypeError, match="read-only"):
                view[0] = 0


def test_two_workers_read_the_same_copy(store: Client) -> None:
    with store.attach("m") as one, store.attach("m") as other:
        with one.acquire(0, [1]) as first, other.acquire(0, [1]) as second:
            assert first.offsets == second.offsets
        assert (other.host_hits, other.nvme_misses) == (1, 0)


def test_hit_path_needs_no_daemon(roomy: Daemon) -> None:
    with Client(roomy.socket) as store, store.attach("m") as session:
        session.acquire(0, [0, 1]).release()
        hits = session.host_hits
        roomy.signal(signal.SIGSTOP)
        try:
            for _ in range(100):
                with session.acquire(0, [1, 0]) as lease:
                    assert bytes(lease.views[0]) == record(0, 1)
            assert session.prefetch([(0, 0), (0, 1)]) == 0
        finally:
            roomy.signal(signal.SIGCONT)
        assert session.host_hits == hits + 200


def test_counts_reach_the_daemon(mortal: Daemon) -> None:
    with Client(mortal.socket) as store, store.attach("m") as session:
        session.acquire(0, [0, 1, 2]).release()
        session.acquire(0, [2, 3]).release()
        assert (session.host_hits, session.nvme_misses) == (1, 4)

        def told() -> bool:
            (model,) = store.stats()["models"]
            return (model["host_hits"], model["nvme_misses"]) == (1, 4)

        eventually(told)


def test_prefetch_then_hit(store: Client) -> None:
    with store.attach("m") as session:
        wanted = [(2, 4), (2, 5)]
        assert session.prefetch(wanted, priority=3) == 2
        eventually(lambda: not session.absent(wanted))
        with session.acquire(2, [4, 5]):
            assert session.prefetch([(2, 6)]) == 1  # while holding, too
        assert (session.host_hits, session.nvme_misses) == (2, 0)


def test_a_hint_waits_for_no_answer(mortal: Daemon) -> None:
    with Client(mortal.socket) as store, store.attach("m") as session:
        mortal.signal(signal.SIGSTOP)
        try:
            for expert in range(2000):  # more than a socket takes
                session.hint([(0, expert % 8)])
        finally:
            mortal.signal(signal.SIGCONT)
        with session.acquire(2, [0]):
            session.hint([(2, 4), (2, 5)])  # while holding, too
            eventually(lambda: not session.absent([(2, 4), (2, 5)]))
        session.hint([], needed=[(2, 6)])
        eventually(lambda: not session.absent([(2, 6)]))
        with pytest.raises(NotFoundError):
            session.hint([(0, 99)])
    session.hint([(0, 0)])  # over: nothing happens


def test_pin_keeps_resident(pack: Path) -> None:
    with (
        serving({"m": pack}, ram=8 * RECORD_BYTES) as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as pinning,
        store.attach("m") as session,
    ):
        assert pinning.pin([(0, 0), (0, 1)]) == 2
        assert pinning.pin([(0, 0)]) == 0
        for layer in (1, 2):
            for lease in session.waves(layer, range(8)):
                lease.release()
        assert session.prefetch([(0, 0), (0, 1)]) == 0  # still there
        assert pinning.unpin([(0, 0)]) == 1
        assert pinning.unpin() == 1
        assert pinning.unpin() == 0


def test_waves(tight: Daemon) -> None:
    with Client(tight.socket) as store, store.attach("m") as session:
        assert session.model.max_fetch_records == 6
        order = [7, 0, 3, 1, 2, 6, 5, 4]
        waves = []
        for lease in session.waves(1, order):
            with lease:
                waves.append(lease.experts)
                assert [bytes(v) for v in lease.views] == [record(1, e) for e in lease.experts]
        assert [expert for wave in waves for expert in wave] == order
        assert [len(wave) for wave in waves] == [6, 2]
        resident = [expert for expert in order if session.prefetch([(1, expert)]) == 0]
        assert len(list(map(type(lease).release, session.waves(1, resident[:4])))) == 1
        with pytest.raises(CapacityError) as raised:
            session.acquire(1, order)
        assert (raised.value.requested, raised.value.available) == (8, 6)
        assert raised.value.unit == "records"


def test_waves_shrink_to_what_pins_leave(pack: Path) -> None:
    with (
        serving({"m": pack}, ram=9 * RECORD_BYTES) as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as pinning,
        store.attach("m") as session,
    ):
        assert session.model.max_fetch_records == 9
        assert pinning.pin([(0, 0), (0, 1), (0, 2)]) == 3
        sizes = []
        for lease in session.waves(1, range(8)):
            with lease:
                sizes.append(len(lease.experts))
        assert sizes == [6, 2]


def test_wave_must_be_released(store: Client) -> None:
    with store.attach("m") as session:
        waves = session.waves(0, [0, 1])
        lease = next(waves)
        assert next(waves, None) is None  # it was all
        lease.release()
        with session.acquire(0, [0]), pytest.raises(PreconditionError, match="release it"):
            next(session.waves(0, [0]))


def test_no_experts_at_all(store: Client) -> None:
    with store.attach("m") as session:
        with session.acquire(0, []) as lease:
            assert lease.views == []
        assert list(session.waves(0, [])) == []
        assert session.prefetch([]) == 0


def test_an_expert_twice(store: Client) -> None:
    with store.attach("m") as session, session.acquire(0, [5, 5]) as lease:
        assert lease.offsets[0] == lease.offsets[1]


def test_one_lease_at_a_time(store: Client) -> None:
    with store.attach("m") as session:
        with session.acquire(0, [0]), pytest.raises(PreconditionError, match="release it"):
            session.acquire(0, [1])
        session.acquire(0, [1]).release()


def test_release_twice_and_late_use(store: Client) -> None:
    with store.attach("m") as session:
        lease = session.acquire(0, [0])
        view = lease.views[0]
        lease.release()
        lease.release()
        with pytest.raises(ValueError, match="released"):
            view[0]
        with pytest.raises(PreconditionError, match="released"):
            lease.views  # noqa: B018
        # One that was released does not end the next one.
        with session.acquire(0, [0]):
            lease.release()
            with pytest.raises(PreconditionError):
                session.acquire(0, [0])


@pytest.mark.parametrize(
    ("layer", "expert", "text"),
    [
        (9, 0, "its MoE layers are 0-2"),
        (0, 8, "no expert 8; it has 8"),
        (0, -1, "no expert -1"),
    ],
)
def test_no_such_expert(store: Client, layer: int, expert: int, text: str) -> None:
    with store.attach("m") as session:
        with pytest.raises(NotFoundError, match=text):
            session.acquire(layer, [0, expert])
        with pytest.raises(NotFoundError, match=text):
            session.prefetch([(layer, expert)])
        session.acquire(0, [0]).release()


def test_wrong_kinds_are_invalid_input(store: Client) -> None:
    with store.attach("m") as session:
        with pytest.raises(InvalidInputError):
            session.pin([(-1, 0)])
        with pytest.raises(InvalidInputError):
            session.pin([("a", "b")])  # type: ignore[list-item]
        with pytest.raises(InvalidInputError):
            session.prefetch([(2, 7)], priority=1 << 40)


def test_damaged_record_is_lost_and_others_serve(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    file = pack / "experts-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[4096 + 3 * RECORD_BYTES] ^= 1
    file.write_bytes(data)
    with (
        serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as session,
    ):
        with pytest.raises(RecordLostError, match="layer 0 expert 3") as raised:
            session.acquire(0, [2, 3])
        assert raised.value.experts == ((0, 3),)
        with session.acquire(0, [2]) as lease:
            assert bytes(lease.views[0]) == record(0, 2)


def test_detach_ends_it(store: Client) -> None:
    session = store.attach("m")
    session.detach()
    session.detach()
    assert not session.connected
    eventually(lambda: num_sessions(store) == 0)
    for call in (
        lambda: session.acquire(0, [0]),
        lambda: session.prefetch([(0, 0)]),
        lambda: session.pin([(0, 0)]),
        lambda: session.unpin(),
        lambda: session.reattach(1),
    ):
        with pytest.raises(PreconditionError, match="not attached"):
            call()


def test_views_outlive_the_session(store: Client) -> None:
    session = store.attach("m")
    lease = session.acquire(0, [2])
    array = np.frombuffer(lease.views[0], np.uint8)
    session.detach()
    with pytest.raises(SessionLostError, match="detached"):
        lease.release()
    del session, lease
    gc.collect()
    assert array.tobytes() == record(0, 2)


def test_detaching_beneath_another_thread(store: Client) -> None:
    """Whatever the worker is about, it ends with an exception of ours."""
    for pause in (0.0, 0.001, 0.002, 0.005):
        session = store.attach("m")
        session.acquire(0, [0, 1]).release()
        ends: list[type[BaseException]] = []

        def work(session: Session = session, ends: list[type[BaseException]] = ends) -> None:
            try:
                while True:
                    with session.acquire(0, [0, 1]) as lease:
                        assert lease.views
            except BaseException as error:
                ends.append(type(error))

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(pause)
        session.detach()
        thread.join()
        assert ends[0] in (PreconditionError, SessionLostError)


def test_forgotten_session_ends(store: Client) -> None:
    threads = threading.active_count()
    session = store.attach("m")
    eventually(lambda: num_sessions(store) == 1)
    del session
    eventually(lambda: num_sessions(store) == 0)
    eventually(lambda: threading.active_count() == threads)


def test_lease_keeps_a_forgotten_session(store: Client) -> None:
    lease = store.attach("m").acquire(0, [1])
    gc.collect()
    time.sleep(0.1)
    assert num_sessions(store) == 1
    assert bytes(lease.views[0]) == record(0, 1)
    lease.release()
    del lease
    eventually(lambda: num_sessions(store) == 0)


def test_closing_the_client_detaches(roomy: Daemon) -> None:
    with Client(roomy.socket) as store:
        session = store.attach("m")
    assert not session.connected
    with pytest.raises(PreconditionError, match="closed"):
        store.list_models()
    with pytest.raises(PreconditionError, match="closed"):
        store.attach("m")
    store.close()


def test_no_leaks(store: Client) -> None:
    store.attach("m").detach()
    gc.collect()
    files, threads = num_open_files(), threading.active_count()
    for _ in range(200):
        with store.attach("m") as session, session.acquire(0, [0, 1]) as lease:
            assert lease.views
    with pytest.raises(NotFoundError):
        store.attach("other")
    del session, lease
    gc.collect()
    eventually(lambda: (num_open_files(), threading.active_count()) == (files, threads))


def hold_too_long(session: Session, other: Session) -> None:
    """Holds records until the daemon, pressed by ``other``, cuts ``session`` off."""
    lease = session.acquire(0, [0, 1, 2])
    for waves in other.waves(1, range(6), in_arena=True):
        waves.release()
    eventually(lambda: not session.connected)
    with pytest.raises(SessionLostError, match="reattach"):
        lease.release()


def test_cut_off_then_reattach(tight: Daemon) -> None:
    with Client(tight.socket) as store, store.attach("m") as session, store.attach("m") as other:
        hold_too_long(session, other)
        first = session.id
        for call in (lambda: session.acquire(0, [0]), lambda: session.pin([(0, 0)])):
            with pytest.raises(SessionLostError, match="reattach"):
                call()
        session.reattach(5)
        assert session.connected
        assert session.id != first
        with session.acquire(0, [0]) as lease:
            assert bytes(lease.views[0]) == record(0, 0)


def test_unloaded_model_ends_its_sessions(pack: Path) -> None:
    with serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon, Client(daemon.socket) as store:
        session = store.attach("m")
        session.acquire(0, [0]).release()
        store.unload_model("m")
        eventually(lambda: not session.connected)
        with pytest.raises(SessionLostError, match="unloaded"):
            session.acquire(0, [0])
        with pytest.raises(NotFoundError):
            session.reattach(5)


def test_void_token_of_an_ended_session_says_so(store: Client) -> None:
    """The answer to a call may overtake the end of the connection."""
    with store.attach("m") as session:
        session.acquire(0, [1]).release()
        session._attachment.credentials = (("expertd-token", "void"),)
        with pytest.raises(UnauthenticatedError):
            session.pin([(0, 0)])
        session._mapping._page.revoke()
        with pytest.raises(SessionLostError):
            session.pin([(0, 0)])


def test_cut_off_outranks_the_block_s_error_but_not_an_interrupt(tight: Daemon) -> None:
    def lose(session: Session, other: Session, error: BaseException) -> None:
        with session.acquire(0, [0, 1, 2]):
            for lease in other.waves(1, range(6), in_arena=True):
                lease.release()
            raise error

    with Client(tight.socket) as store, store.attach("m") as other:
        for error, kind in (
            (RuntimeError("nan"), SessionLostError),
            (KeyboardInterrupt(), KeyboardInterrupt),
        ):
            with store.attach("m") as session, pytest.raises(kind):
                lose(session, other, error)


def test_idle_worker_does_not_hold_up_others(tight: Daemon) -> None:
    """It answers nudges: were it cut off instead, it would not be connected."""
    with Client(tight.socket) as store, store.attach("m") as idle, store.attach("m") as busy:
        before = store.stats()["cut_offs"]
        idle.acquire(0, [0, 1, 2, 3, 4, 5]).release()
        for _ in range(3):
            for layer in range(3):
                for lease in busy.waves(layer, range(8)):
                    lease.release()
        assert idle.connected
        assert store.stats()["cut_offs"] == before


def test_deadline_then_on(tight: Daemon) -> None:
    with Client(tight.socket) as store, store.attach("m") as session, store.attach("m") as other:
        before = store.stats()["cut_offs"]
        tight.signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineError):
                session.acquire(0, [0, 1, 2, 3], timeout_seconds=0.2)
        finally:
            tight.signal(signal.SIGCONT)
        # What the daemon may have granted it late is nobody's: all room is there at once.
        other.acquire(1, range(6)).release()
        assert store.stats()["cut_offs"] == before
        with session.acquire(0, [0]) as lease:
            assert bytes(lease.views[0]) == record(0, 0)
        assert session.connected


def test_record_reads_through_churn(tight: Daemon) -> None:
    """Three workers over a budget of a quarter of the model: no one ever reads a wrong byte."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            with Client(tight.socket) as store, store.attach("m") as session:
                for _ in range(60):
                    layer = int(rng.integers(3))
                    experts = rng.choice(8, 2, replace=False).tolist()
                    with session.acquire(layer, experts) as lease:
                        for view, expert in zip(lease.views, experts, strict=True):
                            assert bytes(view) == record(layer, expert)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
