"""Which scheme with which budget: plain values in, a sentence out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertd_inference.advice.prediction import Prediction, Processor
from expertd_inference.advice.values import Need
from expertstore.sizes import format_bytes

WORTH_IT = 1.25
"""Fewer bits must be so much faster to be worth what they cost in quality."""
PAPER_PERPLEXITY = {"bf16": 3.59, "4bit": 3.76, "paper-3bit": 4.05, "paper-2bit": 4.61}
"""Of Mixtral-8x7B on WikiText2, by scheme: Eliseev & Mazur, arXiv 2312.17238, table 1. Not
measured here; lower is better."""
_PAPER_MODEL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
}


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why; ``row`` is None if this host cannot serve the model."""

    row: Prediction | None
    sentence: str


def paper_perplexity(config: Mapping[str, Any], scheme: str) -> float | None:
    """The paper's figure for that scheme, if ``config`` is of the model that it measured."""
    is_it = all(config.get(key) == value for key, value in _PAPER_MODEL.items())
    return PAPER_PERPLEXITY.get(scheme) if is_it else None


def recommend(
    name: str, rows: Sequence[Prediction], needs: Sequence[Need], ram_bytes: int
) -> Recommendation:
    """Of what fits into ``ram_bytes`` the most bits, unless fewer are worth it."""
    fitting = [row for row in rows if row.fits and row.processor is Processor.CPU]
    if not fitting:
        on_cpu = (row for row in rows if row.processor is Processor.CPU)
        least = min(on_cpu, key=lambda row: row.ram_bytes)
        return Recommendation(
            None,
            f"This host cannot serve {name}: it has {format_bytes(ram_bytes)} of RAM free, and "
            f"{least.scheme} with {least.share:.0%} of the experts in RAM takes "
            f"{format_bytes(least.ram_bytes)}; free some, or take a smaller model.",
        )
    bits = {need.scheme: need.expert_bits for need in needs}
    fastest = max(fitting, key=lambda row: row.typical)
    near = [row for row in fitting if row.typical * WORTH_IT >= fastest.typical]
    most = max(bits[row.scheme] for row in near)
    row = max((row for row in near if bits[row.scheme] == most), key=lambda row: row.typical)
    return Recommendation(
        row, f"Choose {row.scheme} with {_budget(row)}: {_speed(row)}{_why(row, fastest)}."
    )


def _budget(row: Prediction) -> str:
    if row.share >= 1:
        return f"all experts in RAM ({format_bytes(row.budget_bytes)})"
    return f"{format_bytes(row.budget_bytes)} of RAM for experts ({row.share:.0%} of them)"


def _speed(row: Prediction) -> str:
    if row.share >= 1:
        return f"about {row.typical:.3g} tokens/s"
    return f"about {row.typical:.3g} tokens/s typically and {row.worst:.3g} at worst"


def _why(row: Prediction, fastest: Prediction) -> str:
    if fastest.scheme == row.scheme:
        return ", and nothing that fits is faster"
    return (
        f"; {fastest.scheme} would give {fastest.typical:.3g}, too little more to be worth its "
        "fewer bits"
    )
