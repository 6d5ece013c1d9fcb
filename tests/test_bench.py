"""Every part of the benchmark runs in its quickest form; no test judges what a part measures.

``make test`` leaves out the parts as a whole, ``make test-bench`` runs them.
"""

import argparse
import asyncio
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import __main__ as everything
from bench import (
    ablation,
    device_cache,
    executors,
    heldout,
    page,
    prefetch,
    quality,
    routing,
    serve,
    serve_costs,
    store,
)
from bench.figures import Bench, Figure, compared, counted, quartiles
from bench.footprint import footprint
from bench.load_client import Load, LoadClient, LoadError, Stream
from bench.parts import PARTS
from bench.peer import Peer, PeerError, clean_environment
from bench.peers import llama
from bench.results import Curve, Plot, Result, Table, read_result, write_result
from expertd_inference.settings import CachePolicy
from expertstore.pack.manifest import read_manifest
from expertstore.trace import Phase, Row, TraceModel, TraceWriter

ROOT = Path(__file__).parent.parent


def measured(part: str, folder: Path, **options: Any) -> Result:
    """What a part of ``python -m bench`` finds, without a process of its own."""
    result = Result(part, {}, "", "", "")
    for found in PARTS[part].run(Bench(folder, lambda _: None, **store.QUICK, **options)):
        result.add(found)
    return result


@pytest.mark.bench
@pytest.mark.parametrize("part", ["cold", "hints", "hits", "calls", "restart"])
def test_a_part_runs(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    store.main(["--quick", "--json", "--only", part])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures
    for figure in figures:
        assert figure["part"] == part
        assert figure["low"] <= figure["high"]
        assert (figure["goal"] == "") == (figure["met"] is None)


@pytest.mark.bench
def test_hints_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    prefetch.main(["--quick", "--json", "--only", "example"])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures[0]["what"] == "example, 50 % in RAM: decode"
    assert all(figure["ours"] >= 0 for figure in figures)


def test_residency_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = store.default_traces()
    if not traces:
        pytest.skip("no trace lies beside this repository")
    rows = traces[0].read_text().splitlines()
    start = next(i for i, row in enumerate(rows) if row.startswith("decode,"))
    head = next(i for i, row in enumerate(rows) if row.startswith("phase,")) + 1
    trace = tmp_path / "short.csv"
    trace.write_text("\n".join(rows[:head] + rows[start : start + 2000]) + "\n")
    store.main(["--quick", "--json", "--only", "residency", "--trace", str(trace)])
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert 0 < figure["limit"] < 100


def test_the_table_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        compared("calls", "a call", "us", [(3.0, 2.0), (4.0, 2.0), (9.0, 3.0)], at_most=1.5),
        counted("hits", "a hit", "us", [1.0, 2.0, 4.0], at_most=5),
    ]
    store.show(figures)
    shown = capsys.readouterr().out
    assert "2.00 (1.75 to 2.50)" in shown
    assert "missed" in shown
    assert "2.00 (1.50 to 3.00)" in shown


def test_routing_is_bounded_by_what_can_be_known(tmp_path: Path) -> None:
    said = list(routing.measure(Bench(tmp_path, lambda _: None, quick=True)))
    hits, recall = (each for each in said if isinstance(each, Table))
    for row in hits.rows:
        rates = {
            name: [float(part) for part in cell.strip(")").split(" (")]
            for name, cell in zip(hits.columns[1:], row[1:], strict=True)
        }
        for name in rates:
            assert rates[name][0] <= rates["optimum"][0], name
    assert recall.columns[1:3] == ("1 layer ahead", "3 layers ahead")
    for at, name in enumerate(recall.columns[1:-1], 1):
        found = [float(row[at]) for row in recall.rows]
        assert found == sorted(found), name
        assert found[-1] == 1, name
    # Of two guesses: nearer is better, and better than blind.
    near, far, favourites, blind = map(float, recall.rows[1][1:5])
    assert near > far > blind < favourites
    assert any(isinstance(each, str) and "none lies in shared/traces" in each for each in said)


def test_the_gpu_s_lru_is_the_paper_s(tmp_path: Path) -> None:
    routing = np.random.default_rng(0).permuted(np.tile(np.arange(8), (300, 3, 1)), axis=2)[..., :2]
    with TraceWriter(tmp_path / "t.csv", TraceModel((8, 8, 8), (2, 2, 2), (0, 1, 2))) as trace:
        for step, layers in enumerate(routing.tolist()):
            for layer, experts in enumerate(layers):
                trace.write(Row(Phase.DECODE, step, layer, tuple(experts)))
        trace.commit()
    reference = heldout.example_module("evaluate").lru_hit_rates
    for slots in (2, 3, 7):
        ours = device_cache.hit_rates(tmp_path / "t.csv", slots / 8, CachePolicy.LRU)
        # While there are free slots, a layer may take more than its own.
        assert ours.decode == pytest.approx(np.mean(reference(routing, slots)), abs=0.003)
    assert (
        device_cache.hit_rates(tmp_path / "t.csv", 1.0, CachePolicy.LRU).lifetime == 1 - 24 / 1800
    )


def test_a_ratio_near_1_has_digits_behind_the_point() -> None:
    row = compared("p", "what", "us", [(300.25, 300.0)], at_most=1)
    text = page.render([Result("kernels", {}, "", "", "", figures=[row])], [])
    assert "| what | 300 us | 300 us | 1.001 | ratio ≤ 1 | **missed** |" in text


def test_one_value_has_no_spread() -> None:
    assert quartiles([2.0]) == (2.0, 2.0)


def test_torch_s_threads_sleep_in_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Spinning they take the cores from a worker in the same process: 45 tokens/s instead of 60.
    environments = []

    def run(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        environments.append(options["env"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    everything.main(["advise", "--quick", "--out", str(tmp_path)])
    assert [each["OMP_WAIT_POLICY"] for each in environments] == ["PASSIVE"]


@pytest.mark.bench
def test_a_part_leaves_a_file_and_the_page_is_made_of_it(tmp_path: Path) -> None:
    assert everything.main(["kernels", "--quick", "--out", str(tmp_path)]) == 0
    result = read_result(tmp_path / "benchmarks/kernels.json")
    assert result.quick
    assert result.figures
    text = (tmp_path / "benchmarks.md").read_text()
    for figure in result.figures:
        assert f"| {figure.what} |" in text
    assert "a quick run, not to be quoted" in text


@pytest.mark.bench
def test_the_ablation_reads_less_with_every_part_of_it(tmp_path: Path) -> None:
    said = list(ablation.measure(Bench(tmp_path, lambda _: None, traces=(), quick=True)))
    table = next(each for each in said if isinstance(each, Table))
    megabytes = {row[0]: float(row[3]) for row in table.rows}
    manifest = read_manifest(tmp_path / "example").manifest
    assert megabytes["no LRU"] == pytest.approx(manifest.working_set_bytes / 1e6, rel=0.01)
    assert megabytes["whole layers (naive)"] == pytest.approx(manifest.expert_bytes / 1e6, rel=0.01)
    # The same weights in 16 bits.
    assert megabytes["accelerate"] > 3 * megabytes["whole layers (naive)"]
    assert megabytes["no speculation"] < megabytes["no LRU"]
    assert not any("computed by modules" in str(each) for each in said)


@pytest.mark.bench
def test_what_is_advised_stands_beside_what_is_measured(tmp_path: Path) -> None:
    (figure,) = measured("advise", tmp_path).figures
    assert figure.goal == "ratio 0.75 to 1.25"
    assert figure.ours > 0
    assert figure.limit


def test_a_goal_may_have_two_ends() -> None:
    turns = [(2.0, 1.0)]
    assert compared("p", "w", "u", turns, at_least=0.75, at_most=1.25).met is False
    assert compared("p", "w", "u", turns, at_least=3, at_most=4).met is False
    assert compared("p", "w", "u", turns, at_least=2, at_most=2).met is True


@pytest.mark.bench
def test_quality_is_ours_and_hqq_s_alike(tmp_path: Path) -> None:
    said = list(quality.measure(Bench(tmp_path, lambda _: None, quick=True)))
    figures = [each for each in said if isinstance(each, Figure)]
    assert len(figures) == 2
    for figure in figures:
        # Of 1,536 tokens; not of luck, since both decide by one method.
        assert figure.ratio == pytest.approx(1, abs=0.02), figure.what
    assert sum(isinstance(each, Plot | Table) for each in said) == 3


def test_quick_figures_never_reach_docs() -> None:
    with pytest.raises(SystemExit, match="--out"):
        everything.main(["kernels", "--quick"])


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(SystemExit, match="no part 'kernel': there are kernels"):
        everything.main(["kernel"])


def test_results_and_plots_are_written_alike_twice(tmp_path: Path) -> None:
    plot = Plot("p", "A plot", "x", "y", (Curve("a", (1, 2), (3, 4), (2, 3), (4, 5)),))
    bars = Plot("b", "Bars", "", "y", (Curve("a", (0, 1), (3, 4)),), ticks=("one", "two"))
    result = Result("kernels", {"cpu": "x"}, "abc", "2026-01-01", "python -m bench kernels")
    for what in (
        counted("kernels", "a | b", "us", [9.0], at_most=5),
        Table("T", ("a", "b"), (("1", "2"),), "note"),
        plot,
        bars,
        "llama.cpp: not installed",
    ):
        result.add(what)
    write_result(result, tmp_path / "benchmarks")
    assert read_result(tmp_path / "benchmarks/kernels.json") == result
    text = page.write_page(tmp_path).read_text()
    assert "0 of 1 are met. Missed:" in text
    assert "a \\| b" in text
    assert "- llama.cpp: not installed" in text
    pictures = {file.name: file.read_bytes() for file in tmp_path.glob("benchmarks/*.svg")}
    assert set(pictures) == {"p.svg", "b.svg"}
    assert page.write_page(tmp_path).read_text() == text
    assert pictures == {file.name: file.read_bytes() for file in tmp_path.glob("benchmarks/*.svg")}


def test_the_page_in_docs_is_made_of_its_results() -> None:
    results = [ROOT / "docs/benchmarks" / f"{name}.json" for name in PARTS]
    found = [read_result(file) for file in results if file.exists()]
    assert not any(result.quick for result in found)
    gpu_pages = sorted((ROOT / "docs/benchmarks").glob("gpu-*.md"))
    assert (ROOT / "docs/benchmarks.md").read_text() == page.render(found, gpu_pages), (
        "docs/benchmarks.md is stale: run python -m bench --page"
    )


@pytest.mark.bench
def test_sharing_is_measured(tmp_path: Path) -> None:
    result = measured("sharing", tmp_path)
    assert {plot.name for plot in result.plots} == {"sharing-memory", "sharing-speed"}
    memory, start = result.tables
    # The arena of a tiny model is small, but it is counted, and so is the mapped trunk.
    assert len(memory.rows) == 1
    assert [row[0] for row in start.rows][-1] == "all"
    for figure in result.figures:
        assert figure.ours > 0
    assert result.missing == []


def test_memory_is_counted_where_it_lies(tmp_path: Path) -> None:
    num_bytes = 8 << 20
    pack = tmp_path / "pack"
    pack.write_bytes(bytes(num_bytes))
    before = footprint(os.getpid(), tmp_path)
    descriptor = os.memfd_create("arena")
    os.ftruncate(descriptor, num_bytes)
    with (
        pack.open("rb") as file,
        mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ) as mapped,
        mmap.mmap(descriptor, num_bytes) as arena,
        mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own,
    ):
        for at in range(0, num_bytes, mmap.PAGESIZE):
            arena[at] = own[at] = 1
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        after = footprint(os.getpid(), tmp_path)
    os.close(descriptor)
    assert after.shared - before.shared == num_bytes
    assert after.pack - before.pack == num_bytes
    assert (
        num_bytes / 2 < after.own - before.own < 2 * num_bytes
    )  # the interpreter's own comes with it, or goes


def test_a_peer_that_ends_says_why() -> None:
    with (
        Peer("stock", {"path": "/nowhere", "threads": 1}, python=sys.executable) as peer,
        pytest.raises(PeerError, match=r"stock ended: FileNotFoundError.*nowhere/config\.json"),
    ):
        peer.wait_ready()


def test_peers_get_none_of_our_threading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    found = clean_environment()
    assert not {"OMP_WAIT_POLICY", "PYTHONPATH"} & found.keys()
    assert found["PATH"] == os.environ["PATH"]


@pytest.mark.bench
def test_other_programs_are_measured(tmp_path: Path) -> None:
    result = measured("peers", tmp_path, llama_python=str(tmp_path / "python"))
    assert [row[0] for row in result.tables[0].rows] == ["ours", "transformers, bf16"]
    assert any("python cannot be run (No such file" in each for each in result.missing)
    assert any(each.startswith("FreeToken") for each in result.missing)
    if not any(each.startswith("accelerate") for each in result.missing):
        assert [row[0] for row in result.tables[1].rows] == ["ours", "accelerate, to disk"]
        limit, most = (
            float(re.findall(r"([0-9.]+) GiB", text)[0])
            for text in (result.tables[1].title, result.tables[1].note)
        )
        assert 0.1 < most <= limit + 0.05, "it ran in its group"


def test_executors_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "CONTEXT", 2)
    monkeypatch.setattr(executors, "STEPS", {1: 1, 3: 1})
    monkeypatch.setattr(executors, "SEQUENCES", (1, 3))
    said = list(executors.measure(Bench(tmp_path, lambda _: None, quick=True)))
    figures, (table,) = said[:-1], said[-1:]
    assert [figure.what for figure in figures if isinstance(figure, Figure)] == [
        "olmoe-1b-7b, 4 layers: program, 3 sequences / in turns",
        "qwen3-next-80b-a3b, 4 layers: modules, 3 sequences / in turns",
    ]
    assert isinstance(table, Table)
    names = ["**program**", "modules", "turns", "**modules**", "turns"]
    assert [row[1] for row in table.rows] == names
    assert all(len(row) == len(table.columns) == 4 for row in table.rows)


@pytest.mark.bench
def test_a_server_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    serve.main(["--quick", "--json", "--only", "load", "--only", "costs"])
    said = capsys.readouterr()
    assert "not measured: llama-server: --llama-server names no program" in " ".join(
        said.err.split()
    )
    figures = {figure["what"]: figure for figure in json.loads(said.out)["figures"]}
    shape = "olmoe-1b-7b, 2 layers"
    for clients in (1, 3):
        what = f"{shape}, {clients} clients, prompts of 20"
        assert figures[f"{what}: output"]["ours"] > 0
        first = [figures[f"{what}: first token, p{percent}"]["ours"] for percent in (50, 95, 99)]
        assert first == sorted(first)
    leaves = f"{shape}: from one client's leaving to the first token of one that waits"
    assert figures[leaves]["goal"] == "steps <= 2.5"
    step = f"{shape}: a step of 16 sequences drawn by chance"
    schemas = f"{step}, each with a JSON schema of its own / without"
    assert figures[schemas]["ours"] > 0
    assert len(figures) == 2 * 7 + 5


def test_starts_and_switches_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Real ones take half a minute; that engines end when idle is tested with the server.
    asked: list[str | None] = []

    def first(client: LoadClient, _: object) -> float:
        asked.append(client.model)
        return float(len(asked))

    class Worker(nullcontext[Any]):
        started, ready = 1.0, {"loaded": 3.0, "first": 5.0}

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(self)

        def wait_ready(self) -> Any:
            return self

    server = SimpleNamespace(url="http://127.0.0.1:1", engines=[])
    monkeypatch.setattr(serve_costs, "serving_http", lambda *_: nullcontext(server))
    monkeypatch.setattr(
        serve_costs, "serving", lambda *_, **__: nullcontext(SimpleNamespace(socket="s"))
    )
    monkeypatch.setattr(serve_costs, "Peer", Worker)
    monkeypatch.setattr(LoadClient, "first", first)
    options = argparse.Namespace(threads=1, rounds=1)
    loaded, answered = serve_costs.starts("w", options, tmp_path, 256)
    assert (loaded.limit, loaded.goal) == (2.0, "ratio <= 1")
    assert answered.limit == 4.0
    assert answered.ours >= loaded.ours
    assert asked == [None]
    asked.clear()
    packs = {"m": tmp_path, "n": tmp_path}
    switch, again = serve_costs.switches("w", options, packs, 100, 256)
    assert asked == ["m", "n", *"mmnn"]
    assert (switch.ours, again.ours) == (4.0, 5.0)


def test_a_server_that_fails_takes_no_other_figure_with_it() -> None:
    figure = counted("serve", "w", "s", [1.0])

    def figures() -> Iterator[Figure]:
        yield figure
        raise LoadError("It gave 1 of 2 tokens.")

    assert [*serve._or_why(figures())] == [figure, "It gave 1 of 2 tokens."]


def test_llama_s_random_weights_have_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one, all rows of a step become alike and ask the same few experts.
    monkeypatch.setattr(llama, "POOL_BLOCKS", 4096)
    blocks = llama._blocks(np.random.default_rng(0), 1.0)
    integers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4]).astype(float) - 8
    assert abs(integers.mean()) < 0.05
    assert integers.std() == pytest.approx(llama.DEVIATION, rel=0.01)


def test_a_load_is_counted_from_the_first_request_to_the_last_token() -> None:
    load = Load([Stream(1.0, [2.0, 3.0]), Stream(0.0, [1.5, 2.0, 5.0])])
    assert load.tokens_per_second == 5 / 5
    assert [load.first(percent) for percent in (50, 99)] == [1.5, 1.5]
    assert [load.between(percent) for percent in (50, 95)] == [1.0, 3.0]


async def test_a_server_that_ends_early_is_no_figure() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\ndata: [DONE]\n\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = LoadClient(f"http://127.0.0.1:{port}", 100)
        assert len((await client.ask([1], 1)).came) == 1
        with pytest.raises(LoadError, match="gave 1 of 2 tokens"):
            await client.ask([1], 2)
