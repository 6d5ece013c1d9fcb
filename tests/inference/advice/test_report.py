"""What is shown, and what is printed for programs, says the same."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from expertd.packing.shapes import shape_config
from expertd.settings.config import parse_model
from expertd_inference.advice import report
from expertd_inference.advice.advisor import Advice
from expertd_inference.advice.models import Model
from expertd_inference.advice.prediction import predict, predict_gpu
from expertd_inference.advice.recommendation import recommend
from expertd_inference.advice.values import Gpu
from tests.inference.advice.test_prediction import COSTS, GIB, HOST, NEED


def advice(*, ram_bytes: int = GIB, pack: Path | None = None) -> Advice:
    model = Model("org/My-Model", {}, (NEED,), 1000, pack)
    host = replace(HOST, ram_bytes=ram_bytes, gpu=Gpu(GIB, 1e9, 1e12))
    rows = [predict(NEED, COSTS, host, int(share * NEED.expert_bytes), 100) for share in (1.0, 0.5)]
    row = predict_gpu(NEED, host, host.gpu or Gpu(0, 0.0, None), 100)
    assert row is not None
    rows.append(row)
    recommendation = recommend(model.name, rows, model.needs, ram_bytes)
    return Advice(model, host, {"bf16": COSTS}, tuple(rows), recommendation)


def shown(what: Advice) -> str:
    out = io.StringIO()
    report.show(what, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_has_every_row_and_the_choice() -> None:
    text = shown(advice())
    assert "66.7" in text
    assert "(50%)" in text
    assert "at most" in text, "a GPU's bound is called one"
    assert "too large" not in text
    assert "Choose bf16" in text


def test_what_to_run_next_can_be_pasted() -> None:
    pack, serve, run = report.next_commands(advice())
    assert pack == "expertd pack CHECKPOINT my-model-bf16 --scheme bf16"
    assert "--model my-model=my-model-bf16" in serve
    budget = int(serve.split("--ram ")[1].split("MiB")[0]) << 20
    assert budget >= NEED.expert_bytes, "rounded up, never down"
    assert "--threads 2" in run
    assert len(report.next_commands(advice(pack=Path("/packs/m")))) == 2


def test_a_host_that_is_too_small_has_nothing_to_run() -> None:
    small = advice(ram_bytes=1000)
    assert report.next_commands(small) == []
    text = shown(small)
    assert "This host cannot serve org/My-Model" in text
    assert "Next:" not in text


def test_json_has_what_the_table_has() -> None:
    found = report.as_json(advice())
    speeds = [row["tokens_per_second"] for row in found["predictions"]]
    assert speeds[0] == pytest.approx(66.7, 0.01)
    assert found["choice"]["scheme"] == "bf16"
    assert found["host"]["gpu"]["link_bytes_per_second"] == 1e9
    assert found["schemes"]["bf16"]["paper_perplexity"] is None
    assert found["warning"] is None
    assert report.as_json(advice(ram_bytes=1000))["choice"] is None


def test_the_paper_s_perplexity_is_of_its_own_model_alone() -> None:
    other, mixtral = advice(), shape_config("mixtral-8x7b")
    same = replace(other, model=replace(other.model, config=mixtral))
    assert "perplexity" not in shown(other).lower()
    assert "3.59" not in shown(other)
    assert "paper's perplexity" in shown(same)
    assert "3.59" in shown(same)
    assert "arXiv 2312.17238" in shown(same)
    assert report.as_json(same)["schemes"]["bf16"]["paper_perplexity"] == 3.59
    larger = replace(other, model=replace(other.model, config=shape_config("mixtral-8x22b")))
    assert "perplexity" not in shown(larger).lower()


def test_a_busy_host_is_told_of() -> None:
    busy = replace(advice(), busy="This host is busy: figures are too low.")
    assert "figures are too low" in shown(busy)
    assert report.as_json(busy)["warning"] == busy.busy


@pytest.mark.parametrize("name", ["my models/it's", "-v", "a=b"])
def test_what_to_run_next_survives_a_shell(name: str, tmp_path: Path) -> None:
    checkpoint = replace(advice().model, name=Path(name).name, checkpoint=Path(name))
    pack, serve, run = map(shlex.split, report.next_commands(replace(advice(), model=checkpoint)))
    assert Path(pack[2]) == Path(name)
    assert not pack[2].startswith("-")
    served, _ = parse_model(serve[-1])
    assert parse_model(serve[-1])[1].path == Path(pack[3]).absolute()
    assert run[run.index("--model") + 1] == served
