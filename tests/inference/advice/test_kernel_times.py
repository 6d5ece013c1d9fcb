"""The calls that are timed are a token's calls: all its bytes, none twice from a cache."""

from pathlib import Path

import pytest

from expertd.packing.synthetic import make_pack
from expertd_inference.advice import kernel_times
from expertd_inference.advice.kernel_times import KernelTimes, memory_bytes
from expertd_inference.advice.models import find_model
from expertd_inference.advice.probes import MemoryProbe
from expertd_inference.advice.values import Need
from expertstore.native import Loaded
from tests.inference.advice.test_models import TINY

SMALL = 4 << 20


def need_of(tmp_path: Path, scheme: str, **overrides: int) -> Need:
    pack = make_pack(tmp_path / scheme, "qwen3-30b-a3b", scheme, 2, overrides={**TINY, **overrides})
    (need,) = find_model(str(pack)).needs
    return need


@pytest.mark.parametrize("native", [True, False], ids=["native", "without"])
def test_every_scheme_can_be_timed(
    tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(kernel_times, "native_library", lambda: Loaded(None, "none"))
    needs = [need_of(tmp_path, scheme) for scheme in ("bf16", "4bit-fast", "paper-2bit")]
    with MemoryProbe(1, num_bytes=SMALL) as memory:
        times = KernelTimes(memory, needs)
        times.run(0.05)
        seconds = [times.seconds(need) for need in needs]
    assert min(seconds) > 0


def test_a_token_s_time_counts_each_call_as_often_as_it_is_made(tmp_path: Path) -> None:
    need = need_of(tmp_path, "4bit")
    with MemoryProbe(1, num_bytes=SMALL) as memory:
        times = KernelTimes(memory, [need])
        times.run(0.01)
        for call in times._calls.values():
            call.seconds = [1.0]
        # A router is no call: it takes as long as reading it, which is next to nothing.
        calls = 2 + sum(count for matrix, count in need.linears if matrix.bits)
        assert times.seconds(need) == pytest.approx(calls, abs=1e-3)


def test_of_a_matrix_larger_than_the_memory_a_part_is_timed(tmp_path: Path) -> None:
    need = need_of(tmp_path, "4bit", vocab_size=40_000)  # a head of 10 MB
    with MemoryProbe(1, num_bytes=SMALL) as memory:
        times = KernelTimes(memory, [need])
        scales = [call.scale for call in times._calls.values()]
    assert max(scales) > 5
    assert memory_bytes([need]) >= need.max_record_bytes


def test_records_do_not_come_round_before_all_of_the_memory(tmp_path: Path) -> None:
    need = need_of(tmp_path, "4bit")
    with MemoryProbe(1, num_bytes=SMALL) as memory:
        times = KernelTimes(memory, [need])
        places = times._places(need.max_record_bytes)
        assert len(places) == len(set(places)) > 32
        assert max(places) > 0.9 * SMALL - need.max_record_bytes
        assert max(places) + need.max_record_bytes <= SMALL
