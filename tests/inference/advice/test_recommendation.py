"""The choice: the most bits, unless fewer are worth it, of what fits."""

from dataclasses import replace

from expertd_inference.advice.prediction import Prediction, Processor
from expertd_inference.advice.recommendation import recommend
from expertd_inference.advice.values import ExpertLayers, Need
from tests.inference.advice.test_prediction import LAYOUT

WIDE = Need("wide", (ExpertLayers(1, 8, 2, LAYOUT),), (), 0)
NARROW = replace(
    WIDE,
    scheme="narrow",
    experts=(
        ExpertLayers(
            1, 8, 2, type(LAYOUT)(LAYOUT.record_bytes // 4, LAYOUT.parts, LAYOUT.matrices)
        ),
    ),
)
NEEDS = (WIDE, NARROW)
ROW = Prediction("wide", Processor.CPU, 1.0, 1 << 30, 2 << 30, True, 10.0, 10.0, 0.0)


def test_few_bits_that_gain_little_are_not_chosen() -> None:
    rows = [ROW, replace(ROW, scheme="narrow", typical=12.0)]
    recommendation = recommend("m", rows, NEEDS, 4 << 30)
    assert recommendation.row is rows[0]
    assert recommendation.sentence == (
        "Choose wide with all experts in RAM (1.0 GiB): about 10 tokens/s; narrow would give 12, "
        "too little more to be worth its fewer bits."
    )


def test_few_bits_that_gain_much_are_chosen() -> None:
    rows = [ROW, replace(ROW, scheme="narrow", typical=13.0)]
    assert recommend("m", rows, NEEDS, 4 << 30).row is rows[1]


def test_what_does_not_fit_is_not_chosen() -> None:
    half = replace(ROW, share=0.5, budget_bytes=1 << 29, typical=4.0, worst=1.0)
    recommendation = recommend("m", [replace(ROW, fits=False), half], NEEDS, 4 << 30)
    assert recommendation.row is half
    assert "512.0 MiB of RAM for experts (50% of them)" in recommendation.sentence
    assert "4 tokens/s typically and 1 at worst" in recommendation.sentence


def test_a_bound_is_no_prediction() -> None:
    rows = [ROW, replace(ROW, scheme="narrow", processor=Processor.GPU, typical=99.0)]
    assert recommend("m", rows, NEEDS, 4 << 30).row is rows[0]


def test_a_host_that_is_too_small_is_told_what_it_would_take() -> None:
    rows = [replace(ROW, fits=False), replace(ROW, share=0.25, ram_bytes=1 << 29, fits=False)]
    recommendation = recommend("m", rows, NEEDS, 1 << 28)
    assert recommendation.row is None
    assert recommendation.sentence == (
        "This host cannot serve m: it has 256.0 MiB of RAM free, and wide with 25% of the experts "
        "in RAM takes 512.0 MiB; free some, or take a smaller model."
    )
