"""What the bench needs for models that do not fit into RAM: mapped files, limits, and the part."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import memory_limit, spill, synthetic, tiers
from bench.figures import Bench
from bench.results import Table
from expertd_testing.daemon import serving


@pytest.mark.bench
def test_more_model_than_ram_is_measured_beside_mapped_files(tmp_path: Path) -> None:
    said = list(spill.measure(Bench(tmp_path, lambda _: None, traces=(), quick=True)))
    (table,) = (each for each in said if isinstance(each, Table))
    loadings = {row[2]: float(row[4]) for row in table.rows}
    missing = " ".join(each for each in said if isinstance(each, str))
    assert "replayed routing: no trace" in missing
    assert "computed by" not in missing, "a worker decodes such a model by a program"
    assert loadings["ours"] > 0, "half of the experts are not in RAM"
    assert loadings["ours, mmap"] > 0
    if "under the same limit" not in missing:
        assert set(loadings) == {"ours", "mapped", "announced", "ours, direct", "ours, mmap"}


@pytest.mark.bench
def test_mapped_files_give_a_daemons_tokens(tmp_path: Path) -> None:
    pack = synthetic.make_pack(tmp_path / "pack", spill.SHAPE, "4bit", 4, overrides=spill.TINY)
    ids = [5, 9, 2, 7, 7, 1]
    with serving({"m": pack}, ram=1 << 30) as daemon:
        jobs = {
            "ours": {"pack": pack, "socket": daemon.socket},
            "mapped": {"pack": pack, "mapped": True},
        }
        with tiers.workers(jobs) as process:
            ours, mapped = (process.do(name, "decode", ids=ids)["tokens"] for name in jobs)
            rows = [[[0, 1, 2, 3, 4, 5]] * 4] * len(ids)
            others = process.do("mapped", "decode", ids=ids, rows=rows)["tokens"]
    assert ours == mapped
    assert others != mapped, "routing that is given is not the model's own"


def test_memory_is_limited() -> None:
    take = "import sys; sys.stdin.read(1); x = bytearray(256 << 20); print(len(x))"
    try:
        with memory_limit.MemoryLimit("expertd-test") as limit:
            command = f'echo $$ > "{limit.joined_by}" && exec "{sys.executable}" -c "{take}"'
            limit.set(64 << 20)
            done = subprocess.run(
                ["sh", "-c", command], input=b"x", capture_output=True, check=False, timeout=60
            )
    except memory_limit.NoLimitError as error:
        pytest.skip(str(error))
    assert done.stdout == b"", "it took 256 MiB under a limit of 64"
    assert not limit.joined_by.exists()
