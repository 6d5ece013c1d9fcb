"""A host that others use is told from one that only this process does."""

from dataclasses import replace
from pathlib import Path

from expertd_inference.advice.busy import CpuTimes, busy_warning, read_cpu_times

BEFORE = CpuTimes(total=1000.0, busy=100.0, steal=10.0, own=5.0)


def after(*, own: float = 0.0, others: float = 0.0, steal: float = 0.0) -> CpuTimes:
    """Twenty seconds of two cores later."""
    return CpuTimes(1040.0, 100.0 + own + others, 10.0 + steal, 5.0 + own)


def test_our_own_work_is_no_reason() -> None:
    assert busy_warning(BEFORE, after(own=40.0), 9.0) is None
    assert busy_warning(BEFORE, after(own=20.0, others=1.0, steal=0.5), 0.1) is None


def test_others_are() -> None:
    said = busy_warning(BEFORE, after(own=20.0, others=12.0), 3.21)
    assert said is not None
    assert "others used 30% of its cores' time" in said
    assert "load average 3.2" in said
    assert "too low" in said


def test_a_hypervisor_is() -> None:
    said = busy_warning(BEFORE, after(own=20.0, steal=4.0), 0.0)
    assert said is not None
    assert "hypervisor took 10%" in said


def test_a_host_that_does_not_say(tmp_path: Path) -> None:
    assert read_cpu_times(tmp_path) is None
    (tmp_path / "stat").write_text("cpu 0 0\n")
    assert read_cpu_times(tmp_path) is None
    assert busy_warning(None, None, 9.0) is None
    assert busy_warning(BEFORE, BEFORE, 9.0) is None


def test_times_are_read(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 200 300 400 500 600 700 800 900 1000\ncpu0 1 2\n")
    found = read_cpu_times(tmp_path)
    assert found is not None
    assert replace(found, own=0.0) == CpuTimes(36.0, 19.0, 8.0, 0.0)
