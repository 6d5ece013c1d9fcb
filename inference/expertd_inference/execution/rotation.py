"""Rotary embedding: which one a model's attention has, and the tables of its angles."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expertd_inference.execution.parts import RotationSpec, UnknownPartError
from expertd_inference.execution.witness import Attended, LayerSeen, Witness
from expertd_inference.kernels.cpu.operations import RotateCall

_FIRST_POSITIONS = 1024


class Angles:
    """The tables of one :class:`Rotation`, for as many positions as were asked for."""

    def __init__(self, rotation: RotationSpec) -> None:
        self._rotation = rotation
        self._tables: tuple[Tensor, Tensor] | None = None
        self._calls: list[RotateCall] = []
        self.num_positions = 0

    def add(self, call: RotateCall) -> None:
        """``call`` is given the tables from now on."""
        self._calls.append(call)

    def reserve(self, num_positions: int) -> None:
        """Makes tables of at least so many positions."""
        if num_positions <= self.num_positions:
            return
        num_positions = max(_FIRST_POSITIONS, 2 * num_positions)
        positions = torch.arange(num_positions)[None]
        cos, sin = (part[0].float().contiguous() for part in self._rotation.angles(positions))
        self._tables, self.num_positions = (cos, sin), num_positions
        for call in self._calls:
            call.cos, call.sin = cos.data_ptr(), sin.data_ptr()


def find_rotation(
    query: Tensor,  # [1, heads, T, d], normed
    key: Tensor,
    call: Attended,
    seen: LayerSeen,
    witness: Witness,
) -> RotationSpec | None:
    """What makes of these what attention was given. Raises UnknownPartError."""
    if near(query, call.query) and near(key, call.key):
        return None
    given = seen.arguments.get("position_embeddings")
    for module, args, kwargs, result in witness.rotations:
        if given is None or not isinstance(result, tuple) or result[0] is not given[0]:
            continue
        for turned, choose in _angle_forms(given[0], query.shape[-1]):
            for pairs in (False, True):
                cos, sin = (choose(part) for part in given)
                if all(
                    near(rotate(before, cos, sin, turned, pairs=pairs), after)
                    for before, after in ((query, call.query), (key, call.key))
                ):
                    form = (id(result), turned, pairs)
                    made = RotationSpec(_angles(module, args, kwargs, choose), turned, pairs)
                    known: RotationSpec = witness.found.setdefault(form, made)
                    return known
    raise UnknownPartError("its positions are told otherwise than by angles")


def rotate(
    x: Tensor,  # [1, heads, T, d]
    cos: Tensor,  # [1, T, turned / 2]
    sin: Tensor,
    turned: int,
    *,
    pairs: bool,
) -> Tensor:
    """Rotary embedding of the first ``turned`` elements."""
    cos, sin = cos[:, None], sin[:, None]
    part, rest = x[..., :turned], x[..., turned:]
    a, b = (part[..., ::2], part[..., 1::2]) if pairs else part.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    new = torch.stack((first, second), -1).flatten(-2) if pairs else torch.cat((first, second), -1)
    return torch.cat((new.to(x.dtype), rest), -1)


_Choose = Callable[[Tensor], Tensor]


def _angle_forms(cos: Tensor, width: int) -> list[tuple[int, _Choose]]:
    """How many elements may be turned by such cosines, and which of these there is one of each."""
    num = cos.shape[-1]
    forms: list[tuple[int, _Choose]] = []
    if num <= width and num % 2 == 0:
        half = num // 2
        if torch.equal(cos[..., :half], cos[..., half:]):
            forms.append((num, lambda part: part[..., :half]))
        if torch.equal(cos[..., ::2], cos[..., 1::2]):
            forms.append((num, lambda part: part[..., ::2]))
    if 2 * num <= width:
        forms.append((2 * num, lambda part: part))
    return forms


def _angles(
    module: Any,  # noqa: ANN401 - a module
    args: Sequence[Any],
    kwargs: dict[str, Any],
    choose: _Choose,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Calls ``module`` as the model does, for other positions."""

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if "position_ids" in kwargs:
                cos, sin = module(*args, **{**kwargs, "position_ids": positions})
            else:
                cos, sin = module(args[0], positions, *args[2:], **kwargs)
        return choose(cos), choose(sin)

    return angles


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for roundings."""
    if ours.shape != theirs.shape:
        return False
    difference = (ours.float() - theirs.float()).norm()
    return bool(difference <= 0.01 * theirs.float().norm())
