"""What of all known models this host can serve, and how fast."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.packing.shapes import SHAPES, shape_config
from expertd_inference.advice.advisor import SHARES, Question, measure
from expertd_inference.advice.host import MAX_READ_BYTES
from expertd_inference.advice.models import Model, find_model
from expertd_inference.advice.prediction import CONTEXT, Costs, Prediction, predict
from expertd_inference.advice.twin import STAND_IN
from expertd_inference.advice.values import Host, Need, Reading
from expertstore.errors import InvalidInputError
from expertstore.shared.host_memory import memory_available

_SMALL_BYTES = 256 << 10
_RECORDS = 8
"""That a layer asks for at once where the disk is measured."""


@dataclass(frozen=True)
class Survey:
    """What fits, the model with the most weights first, each one's fastest scheme first."""

    host: Host
    rows: tuple[tuple[Model, Prediction], ...]
    busy: str | None = None


def survey(question: Question, say: Callable[[str], None]) -> Survey:
    """Measures this host for all shapes at once, in turns; only what fits is kept.

    What a token costs besides its matrices is that of one model, by layer. Of each model and scheme
    there is one row: with as many of the experts in RAM as there is room for. Raises ExpertdError
    where nothing can be measured.
    """
    ram = memory_available()
    models = [find_model(name) for name in SHAPES]
    needs = [(model, need) for model in models for need in model.needs
             if min(_budgets(need, question)) + need.trunk_bytes < ram]  # fmt: skip
    if not needs:
        raise InvalidInputError("No known model fits this host; --model SHAPE says what it lacks.")
    kinds = {"small": (_SMALL_BYTES, _RECORDS), "large": (MAX_READ_BYTES, _RECORDS)}
    measured = measure(
        [need for _, need in needs],
        shape_config(STAND_IN),
        question.directory or Path.cwd(),
        kinds,
        question,
        say,
    )
    layers = shape_config(STAND_IN)["num_hidden_layers"]
    rows = []
    for model, need in needs:
        costs = measured.costs(
            need,
            _reading(measured.readings["small"], measured.readings["large"], need),
            model.config["num_hidden_layers"] / layers,
        )
        row = _best(model, need, costs, measured.host, measured.worker_bytes, question)
        if row is not None:
            rows.append((model, row))
    rows.sort(key=lambda found: (-_num_weights(found[0]), -found[1].typical))
    return Survey(measured.host, tuple(rows), measured.busy)


def _budgets(need: Need, question: Question) -> list[int]:
    """Largest first."""
    if question.ram_bytes is not None:
        return [max(need.working_set_bytes, min(need.expert_bytes, question.ram_bytes))]
    return [max(need.working_set_bytes, int(share * need.expert_bytes)) for share in SHARES]


def _best(
    model: Model, need: Need, costs: Costs, host: Host, worker_bytes: int, question: Question
) -> Prediction | None:
    """With the largest budget that fits."""
    for budget in _budgets(need, question):
        row = predict(need, costs, host, budget, worker_bytes + CONTEXT * model.kv_bytes)
        if row.fits and (question.ram_bytes is None or budget <= question.ram_bytes):
            return row
    return None


def _reading(small: Reading, large: Reading, need: Need) -> Reading:
    """Of its records, on the line through the two sizes that were measured."""
    place = (need.max_record_bytes - _SMALL_BYTES) / (MAX_READ_BYTES - _SMALL_BYTES)

    def between(one: float, other: float) -> float:
        # Nothing is read in less time than a small record.
        return max(one, one + place * (other - one)) if place > 0 else one

    return Reading(between(small.one, large.one), between(small.many, large.many), _RECORDS)


def _num_weights(model: Model) -> float:
    need = model.needs[0]
    return 8 * need.expert_bytes / need.expert_bits
