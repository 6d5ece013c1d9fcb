"""The steps and the example of docs/remote.md, as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from expertd_testing.daemon import serving
from tests.client.conftest import RECORD_BYTES

PAGE = (Path(__file__).parents[2] / "docs" / "remote.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_certificates_settings_and_client(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    making, copying = blocks("bash")
    script = (making + copying).replace("10.1.0.5", "127.0.0.1")
    subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, check=True, capture_output=True, timeout=60
    )
    (settings,) = blocks("toml")
    config = tmp_path / "expertd.toml"
    config.write_text(
        settings.replace("/etc/expertd/tls", str(tmp_path / "tls")).replace(
            "0.0.0.0:7443", "127.0.0.1:0"
        )
    )
    with serving({"mixtral": pack}, config=config) as daemon:
        found = re.search(r" listening tcp=(\S+)", daemon.stderr)
        assert found, daemon.stderr
        (example,) = blocks("python")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", example.replace("store.lab:7443", found[1])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"False {[RECORD_BYTES] * 2}", "0 2"]
