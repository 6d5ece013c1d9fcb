"""``expertd doctor`` on this host, which serves: the tests' daemons do."""

import json
import subprocess
import sys
from ctypes import c_char_p
from pathlib import Path
from typing import Any

from expertd.doctor.gpu import find_driver
from expertd.doctor.host import Driver, Gpu
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack

WITHOUT_TORCH = (
    "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers']));"
    " from expertd.cli import main; main()"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_this_host(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    with serving({"m": pack}) as daemon:
        done = run("doctor", "--socket", daemon.socket, "--pack", pack, "--json")
    checks = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert checks["daemon"]["found"] == f"serves at {daemon.socket}"
    assert "GB/s" in checks["pack"]["found"]
    assert checks["torch"]["state"] == "ok", "told without importing it"
    assert {"kernel", "memory", "locked memory", "huge pages", "disk", "registration"} <= {*checks}
    assert all(row["advice"] for row in checks.values() if row["state"] != "ok")
    done = run("doctor", "--socket", tmp_path / "s", "--pack", tmp_path)
    assert done.returncode == 1
    assert "is not a pack" in done.stdout
    assert "none answers" in done.stdout


class FakeCuda:
    """libcuda with one GPU; ``started`` is what cuInit returns."""

    def __init__(self, started: int = 0) -> None:
        self.started = started

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            values = {"cuDriverGetVersion": 12040, "cuDeviceGetCount": 1, "cuDeviceGet": 0,
                      "cuDeviceTotalMem_v2": 1 << 34}  # fmt: skip
            if name == "cuInit":
                return self.started
            if name == "cuDeviceGetName":
                arguments[0].value = c_char_p(b"A card").value
            elif name == "cuDeviceGetAttribute":
                known = {75: 8, 76: 6, 99: 1, 113: 0}
                arguments[0]._obj.value = known[arguments[1]]
            else:
                arguments[0]._obj.value = values[name]
            return 0

        return call


def test_the_driver() -> None:
    gpu = Gpu("A card", 1 << 34, (8, 6), can_register=True, can_register_read_only=False)
    assert find_driver(FakeCuda()) == Driver("12.4", (gpu,))  # type: ignore[arg-type]
    assert find_driver(FakeCuda(100)) == Driver("12.4")  # type: ignore[arg-type]
    broken = find_driver(FakeCuda(803))  # type: ignore[arg-type]
    assert broken == Driver("12.4", error="cuInit returns 803")
