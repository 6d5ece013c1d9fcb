"""Copy or compute: the split, what it learns, and what a host remembers of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertd_inference.device import calibration
from expertd_inference.device.cost import SLACK, CostModel, Rates
from expertd_inference.experts.call import seat_of
from expertd_inference.settings import OnMiss
from expertd_testing.fake_device import FakeDevice, FakeSpeed
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import make_rig

Make = Callable[..., Any]
MIB = 1 << 20


def model(link: float, cpu: float, *, copy: float = 0.0, call: float = 0.0) -> CostModel:
    return CostModel(Rates(link, copy, cpu, call, 1e13))


def test_link_and_cpu_end_together() -> None:
    # The CPU has 75 - 25 = 50 GB/s left while copies run: twice the link's.
    assert model(25e9, 75e9).num_on_cpu(6, 8 * MIB) == 4
    assert model(25e9, 50e9).num_on_cpu(6, 8 * MIB) == 3


def test_all_to_the_better_way() -> None:
    assert model(25e9, 1e9).num_on_cpu(8, MIB) == 0
    assert model(1e9, 75e9).num_on_cpu(8, MIB) == 8
    assert model(25e9, 75e9, call=1.0).num_on_cpu(8, MIB) == 0
    assert model(25e9, 75e9, copy=1.0).num_on_cpu(8, MIB) == 8
    assert model(25e9, 75e9).num_on_cpu(0, MIB) == 0


def test_it_is_the_least_of_all_splits() -> None:
    for link, cpu, call, num in ((20e9, 60e9, 1e-5, 8), (50e9, 60e9, 1e-4, 4), (10e9, 9e9, 0, 3)):
        cost = model(link, cpu, copy=1e-5, call=call)

        def seconds(on_cpu: int, cost: CostModel = cost, num: int = num) -> float:
            copied = num - on_cpu
            copy = cost.copy_seconds(copied * MIB) if copied else 0
            compute = cost.cpu_seconds(on_cpu * MIB, copying=copied > 0) if on_cpu else 0
            return max(copy, compute)

        chosen = cost.num_on_cpu(num, MIB)
        assert seconds(chosen) <= (1 + SLACK) * min(map(seconds, range(num + 1)))
        assert all(seconds(fewer) > seconds(chosen) for fewer in range(chosen))


def test_it_learns_from_what_came_of_it() -> None:
    cost = model(25e9, 75e9)
    before = cost.num_on_cpu(6, 8 * MIB)
    for _ in range(60):  # another process takes most of the cores
        cost.observe_cpu(8 * MIB, 5 * 8 * MIB / 75e9)
    assert cost.cpu_correction == pytest.approx(5, rel=0.02)
    assert cost.num_on_cpu(6, 8 * MIB) < before
    for _ in range(60):  # and then the link is shared
        cost.observe_copies(8 * MIB, 9 * 8 * MIB / 25e9)
    assert cost.num_on_cpu(6, 8 * MIB) > 2


def test_one_wild_measurement_does_not_upset_it() -> None:
    cost = model(25e9, 75e9)
    cost.observe_cpu(MIB, 3600.0)  # the process was stopped
    cost.observe_copies(MIB, -1.0)
    assert cost.cpu_correction < 2
    assert cost.link_correction > 0.5


def test_measured_on_a_device_whose_speed_is_known(packed: Make, tmp_path: Path) -> None:
    speed = FakeSpeed(
        link_bytes_per_second=1e9,
        copy_seconds=1e-4,
        memory_bytes_per_second=1e10,
        call_seconds=0,
        # More than all the time of a measurement, as Triton's compiler takes.
        compile_seconds=2.0,
    )
    device = FakeDevice(speed=speed)
    rig = make_rig(HeldPackSource(packed("mixtral")), device, on_miss=OnMiss.COPY, num_slots=9)
    (runner,) = rig.group.runners
    module = rig.model.model.layers[0].mlp.experts
    probe = calibration.Probe(
        device, runner.engine, rig.source, 0, range(4), seat_of(module).spec, runner.fill_slots
    )
    remembered = calibration.calibration(tmp_path / "c" / "calibration.json")
    rates = calibration.calibrated(probe, remembered)
    assert rates.link_bytes_per_second == pytest.approx(1e9, rel=0.01)
    assert rates.copy_seconds == pytest.approx(1e-4, rel=0.05)
    assert rates.device_bytes_per_second == pytest.approx(1e10, rel=0.01)
    assert rig.source.lease is None
    # Remembered: nothing is copied again, by whichever process.
    num_copies = len(device.log)
    assert calibration.calibrated(probe, remembered) == rates
    assert len(device.log) == num_copies
    # Of something else it knows nothing.
    device.hardware = "another"
    calibration.calibrated(probe, remembered)
    assert len(device.log) > num_copies


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"x": 1}',
        b'{"KEY": {"link_bytes_per_second": 0, "copy_seconds": 0, "cpu_bytes_per_second": 0, '
        b'"cpu_seconds": 0, "device_bytes_per_second": 0}}',
        # The compiler was timed.
        b'{"KEY": {"link_bytes_per_second": 2.5e10, "copy_seconds": 0, "cpu_bytes_per_second": '
        b'2e10, "cpu_seconds": 0, "device_bytes_per_second": 4.4e6}}',
    ],
)
def test_what_is_wrong_with_the_file_is_measured_anew(
    content: bytes, packed: Make, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    rig = make_rig(HeldPackSource(packed("mixtral")), on_miss=OnMiss.COPY, num_slots=9)
    (runner,) = rig.group.runners
    module = rig.model.model.layers[0].mlp.experts
    probe = calibration.Probe(
        rig.device, runner.engine, rig.source, 0, range(2), seat_of(module).spec, runner.fill_slots
    )
    probe.engine.attach()
    path.write_bytes(content.replace(b"KEY", probe.key.encode()))
    remembered = calibration.calibration(path)
    rates = calibration.calibrated(probe, remembered)
    assert rates.device_bytes_per_second >= rates.link_bytes_per_second > 0
    assert calibration.calibrated(probe, calibration.calibration(path)) == rates


def test_what_only_its_launch_takes_is_not_slower_than_the_link(packed: Make) -> None:
    device = FakeDevice(speed=FakeSpeed(call_seconds=1e-2))
    rig = make_rig(HeldPackSource(packed("mixtral")), device, on_miss=OnMiss.COPY, num_slots=9)
    (runner,) = rig.group.runners
    module = rig.model.model.layers[0].mlp.experts
    probe = calibration.Probe(
        device, runner.engine, rig.source, 0, range(2), seat_of(module).spec, runner.fill_slots
    )
    rates = calibration.measure(probe)
    assert rates.device_bytes_per_second == rates.link_bytes_per_second


@pytest.mark.parametrize("trouble", ["no home", "not writable", "damaged", "none"])
def test_what_is_wrong_with_its_file_a_group_says_once(
    trouble: str, packed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "expertd" / "calibration.json"
    words = f"{path} could not be read (it is damaged), and is written anew."
    if trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # nor in the system's list
        words = "There is no home directory, so each start measures anew how fast link"
    elif trouble == "not writable":
        path.parent.write_text("")
        words = f"{path} cannot be written ("
    elif trouble == "damaged":
        path.parent.mkdir()
        path.write_text("{")
    said: list[str] = []
    source = HeldPackSource(packed("mixtral"))
    rig = make_rig(source, rates=None, say=said.append, on_miss=OnMiss.AUTO, num_slots=9)
    assert rig.group.runners[0].cost.rates.link_bytes_per_second > 0
    if trouble == "none":
        assert said == []
        assert path.exists()
    else:
        (sentence,) = said
        assert sentence.startswith(words)
