"""What an adapter adds to experts, in the forms in which peft writes it.

By expert, as ``mlp.experts.3.gate_proj``, where the adapter was trained on experts that were
modules of their own (Mixtral's are ``w1``, ``w3`` and ``w2``); or of all experts of a layer
together, as peft's ``target_parameters`` has it.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from expertd_inference.experts.adapting import LowRankWeights
from expertd_inference.experts.call import ExpertsSeat, has_seat, seat_of
from expertd_inference.experts.cpu import CpuExperts
from expertstore.adapter import AdapterFiles, LowRank
from expertstore.errors import AdapterError
from expertstore.pack.layout import DOWN, GATE_UP
from expertstore.pack.manifest import GateOrder

ExpertParts = dict[tuple[int, str], list[tuple[slice, LowRankWeights]]]
"""By expert and matrix: rows of the product, and what is added to them."""
_ONE = re.compile(r"(?:.*\.)?layers\.(\d+)\..*?experts\.(\d+)\.(\w+)")
_ALL = re.compile(r"(.*\.experts)(?:\.base_layer)*")
_MATRICES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}


def experts_parts(
    files: AdapterFiles, part: LowRank, a: Tensor, b: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[int, ExpertParts] | None:
    """The decoder layer, and what ``part`` adds to its experts; None if it adds to something else.

    Raises AdapterError if it does not fit, or the experts are not computed on the CPU.
    """
    seats = {seat_of(each).layer: seat_of(each) for each in modules.values() if has_seat(each)}
    if (one := _ONE.fullmatch(part.module)) is not None and one[3] in _MATRICES:
        layer, expert = int(one[1]), int(one[2])
        seat = _checked(files, part, seats.get(layer))
        if expert >= seat.num_experts:
            raise _other_base(files, part, f"a layer has {seat.num_experts} experts in this model")
        return layer, _of_one(files, part, a, b, seat, expert, _MATRICES[one[3]])
    together = _ALL.fullmatch(part.module)
    module: Any = modules.get(together[1]) if together is not None else None
    if module is None or not has_seat(module):
        return None
    seat = _checked(files, part, seat_of(module))
    return seat.layer, _of_all(files, part, a, b, seat)


def _of_one(
    files: AdapterFiles,
    part: LowRank,
    a: Tensor,
    b: Tensor,
    seat: ExpertsSeat,
    expert: int,
    matrix: str,
) -> ExpertParts:
    inner, hidden = _sizes(seat)
    wanted = (inner, hidden) if matrix == "down" else (hidden, inner)
    if (a.shape[1], b.shape[0]) != wanted:
        raise _other_base(
            files, part, f"such a matrix has {wanted[0]} inputs and {wanted[1]} outputs"
        )
    if matrix == "down":
        return {(expert, DOWN): [(slice(None), LowRankWeights(a, b, part.scale))]}
    if seat.spec.gate_order is GateOrder.INTERLEAVED:
        raise _other_base(files, part, "its experts have gate and up in one matrix")
    place = slice(0, inner) if matrix == "gate" else slice(inner, 2 * inner)
    return {(expert, GATE_UP): [(place, LowRankWeights(a, b, part.scale))]}


def _of_all(
    files: AdapterFiles, part: LowRank, a: Tensor, b: Tensor, seat: ExpertsSeat
) -> ExpertParts:
    inner, hidden = _sizes(seat)
    names = {(hidden, 2 * inner): GATE_UP, (inner, hidden): DOWN}
    name = names.get((a.shape[1], b.shape[0]))
    if name is None or a.shape[0] % seat.num_experts:
        raise _other_base(
            files,
            part,
            f"a layer has {seat.num_experts} experts of {hidden} inputs and {inner} inner ones",
        )
    # peft has A by expert and then rank, and B by rank and then expert.
    of_a = a.view(seat.num_experts, -1, a.shape[1])
    of_b = b.view(b.shape[0], -1, seat.num_experts)
    return {
        (expert, name): [
            (slice(None), LowRankWeights(of_a[expert], of_b[:, :, expert], part.scale))
        ]
        for expert in range(seat.num_experts)
    }


def _sizes(seat: ExpertsSeat) -> tuple[int, int]:
    """Of what is between an expert's matrices, and of what enters it."""
    down = seat.spec.layout.matrix(DOWN)
    return down.in_features, down.out_features


def _checked(files: AdapterFiles, part: LowRank, seat: ExpertsSeat | None) -> ExpertsSeat:
    if seat is None:
        raise _other_base(files, part, "that layer has no experts in this model")
    if not isinstance(seat.runner, CpuExperts):
        raise AdapterError(
            f"{files.directory} adds to experts ({part.module}), which is computed on the CPU "
            "only; leave out --device."
        )
    return seat


def _other_base(files: AdapterFiles, part: LowRank, why: str) -> AdapterError:
    has = f"{part.a.shape[1]} inputs and {part.b.shape[0]} outputs"
    return AdapterError(
        f"{files.directory} is of another base: {part.module} has {has} there, and {why}."
    )
