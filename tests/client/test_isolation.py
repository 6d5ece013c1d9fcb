"""Processes: another user's, a forked one, a killed one, and a fresh one's start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import eventually

NOBODY = 65534

READ_ONLY = """
import ctypes, mmap, os, sys
from pathlib import Path
from expertstore.errors import PermissionDeniedError
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role
from expertd_client import Client

os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
directory = Path(sys.argv[1])

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert isinstance(error, PermissionError), error
    else:
        raise AssertionError(call)

with handshake(directory, Role.WORKER, "m", 5) as greeting:
    arena, table, page = greeting.descriptors
    for fd in (arena, table):
        size = os.fstat(fd).st_size
        refused(mmap.mmap, fd, size, access=mmap.ACCESS_WRITE)
        refused(os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
        refused(os.fchmod, fd, 0o666)
        for call in (os.ftruncate, os.pwrite):
            try:
                call(fd, *((0,) if call is os.ftruncate else (b"x", 0)))
            except OSError:
                pass
            else:
                raise AssertionError(call)
        readable = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        raw = (ctypes.c_void_p * 16)()
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(readable), ctypes.byref(raw), 0)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(raw[0]), 4096, 3) == -1
    mmap.mmap(page, os.fstat(page).st_size).close()

with Client(directory) as store, store.attach("m") as session:
    with session.acquire(0, [0]) as lease:
        assert len(lease.views[0])
    try:
        store.unload_model("m")
    except PermissionDeniedError as error:
        print("refused:", error)
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_can_read_but_not_write(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'allowed_uids = [{NOBODY}]\nsocket_mode = "666"\n')
    with serving({"m": pack}, ram=64 * RECORD_BYTES, config=config) as daemon:
        daemon.socket.chmod(0o755)
        daemon.socket.parent.chmod(0o755)
        done = run(READ_ONLY, daemon.socket)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("refused: uid 65534")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize(
    ("become", "says"),
    [
        ("os.setresgid(65534, 65534, 65534)", "User 65534 may not connect"),
        ("pass", "allowed_uids"),  # the group still lets it knock
    ],
)
def test_another_user_uninvited(roomy: Daemon, become: str, says: str) -> None:
    roomy.socket.chmod(0o755)
    roomy.socket.parent.chmod(0o755)
    done = run(
        "import os, sys\n"
        "from expertd_client import Client, PermissionDeniedError\n"
        "os.setgroups([])\n"
        f"{become}\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "try: Client(sys.argv[1]).attach('m')\n"
        "except PermissionDeniedError as error: print(error)\n",
        roomy.socket,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert says in done.stdout


FORKING = """
import os, sys, time
from expertd_client import Client, PreconditionError

store = Client(sys.argv[1])
session = store.attach("m")
lease = session.acquire(0, [0])
pid = os.fork()
if pid == 0:
    calls = (
        lease.release, lambda: session.acquire(0, [0]), lambda: session.prefetch([(0, 1)]),
        store.list_models, lambda: session.reattach(1),
    )
    for call in calls:
        try:
            call()
        except PreconditionError as error:
            assert "fork" in str(error), error
        else:
            os._exit(1)
    assert not session.connected
    session.detach()
    store.close()
    del session, lease
    print("child ok", flush=True)
    sys.stdin.read()
    os._exit(0)
else:
    if sys.argv[2] == "stay":
        sys.stdin.read()
        lease.release()
        with session.acquire(0, [0, 1]):
            print("parent ok", flush=True)
        session.detach()
        store.close()
        os.waitpid(pid, 0)
    else:
        # Dies like one that was killed, while its child lives on.
        time.sleep(0.5)
        os._exit(0)
"""


def forking(daemon: Daemon, what: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", FORKING, str(daemon.socket), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_fork_leaves_the_parent_s_session_alone(roomy: Daemon) -> None:
    process = forking(roomy, "stay")
    assert process.stdout is not None
    assert process.stdout.readline() == "child ok\n"
    out, err = process.communicate("", timeout=20)
    assert (out, process.returncode) == ("parent ok\n", 0), err


def test_forked_child_does_not_keep_a_dead_parent_s_session(roomy: Daemon) -> None:
    with Client(roomy.socket) as store:
        process = forking(roomy, "die")
        assert process.stdout is not None
        assert process.stdout.readline() == "child ok\n"
        process.wait(20)
        eventually(lambda: store.stats()["sessions"] == [])
        process.communicate("", timeout=20)


def test_killed_worker_frees_all_it_held(tight: Daemon) -> None:
    script = (
        "import sys, time\n"
        "from expertd_client import Client\n"
        "session = Client(sys.argv[1]).attach('m')\n"
        "lease = session.acquire(0, range(6))\n"
        "print('holds', flush=True)\n"
        "time.sleep(60)\n"
    )
    with Client(tight.socket) as store, store.attach("m") as session:
        worker = subprocess.Popen(
            [sys.executable, "-c", script, str(tight.socket)], stdout=subprocess.PIPE, text=True
        )
        with worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "holds\n"
            before = store.stats()["cut_offs"]
            worker.send_signal(signal.SIGKILL)
            session.acquire(1, range(6)).release()
            assert store.stats()["cut_offs"] == before


START = """
import sys, time
began = time.process_time()
from expertd_client import Client
store = Client(sys.argv[1])
session = store.attach("m")
attached = time.process_time()
heavy = {"torch", "numpy", "transformers", "rich", "typer"} & set(sys.modules)
assert not heavy, heavy
print(attached - began)
"""


def test_start_is_quick_and_light(roomy: Daemon) -> None:
    totals = []
    for _ in range(5):
        done = run(START, roomy.socket)
        assert (done.returncode, done.stderr) == (0, "")
        totals.append(float(done.stdout))
    # Processor time, the best of five: the machine may be doing other things.
    assert min(totals) < 0.2


def test_process_that_just_ends(roomy: Daemon) -> None:
    """Neither hangs at exit nor complains, whatever it left open."""
    done = run(
        "import sys\n"
        "from expertd_client import Client\n"
        "session = Client(sys.argv[1]).attach('m')\n"
        "lease = session.acquire(0, [0])\n"
        "views = lease.views\n",
        roomy.socket,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
