"""The devices and cores of a model's engines."""

import os
from dataclasses import replace

import pytest

from expertd_inference.engine.budget import EngineLimits
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.replicas import core_sets, places, replicas
from expertstore.errors import InvalidInputError

SPEC = EngineSpec(model="m", socket=None, limits=EngineLimits(max_sequences=3))


def test_one_engine_on_each_device() -> None:
    specs = replicas(SPEC, ["cuda:0", "cuda:1,cuda:2"], 1)
    assert [spec.place for spec in specs] == ["cuda:0", "cuda:1,cuda:2"]
    assert {spec.limits for spec in specs} == {SPEC.limits}


def test_engines_on_the_cpu_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    specs = replicas(SPEC, ["cpu"], 2)
    assert [spec.place for spec in specs] == ["cpu 0", "cpu 1"]
    assert {spec.limits for spec in specs} == {EngineLimits(max_sequences=3, num_engines=2)}
    (alone,) = replicas(SPEC, ["cpu"], 1)
    assert alone == SPEC, "nothing is said of cores where it may have all"


@pytest.mark.parametrize(
    ("devices", "num_engines", "message"),
    [
        (["cuda:0", "cuda:0"], 1, "named twice.*--engines"),
        (["cuda:0"], 2, "--engines 2 is for the CPU.*repeat --device"),
        (["cpu", "cuda:0"], 2, "--engines 2 is for the CPU"),
        (["cpu"], 1 << 20, r"There are \d+ cores.*or fewer"),
    ],
)
def test_what_does_not_fit_is_refused(devices: list[str], num_engines: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replicas(SPEC, devices, num_engines)


def test_engines_that_round_otherwise_are_not_exact() -> None:
    devices = ["cuda:0", "cpu"]
    assert [spec.place for spec in replicas(SPEC, devices, 1)] == devices
    exact = replace(SPEC, exact=True)
    assert len(replicas(exact, ["cuda:0", "cuda:1,cuda:2"], 1)) == 2
    with pytest.raises(InvalidInputError, match=r"cuda and cpu round otherwise.*leave out --exact"):
        replicas(exact, devices, 1)


def test_the_parts_are_neighbours() -> None:
    # Two nodes of two cores with two threads each, numbered as Linux does.
    host = {core: (core // 2 % 2, core % 4) for core in range(8)}
    assert core_sets(host, 2) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert core_sets(host, 4) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert core_sets(host, 3) == [(0, 4), (1, 2, 5), (3, 6, 7)]
    assert core_sets(host, 1) == [tuple(range(8))]


def test_this_host_s_cores_have_places() -> None:
    cores = os.sched_getaffinity(0)
    assert places(cores).keys() == cores
