"""The parts of a model as operations on fixed memory, cut where experts are asked."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd_inference.execution.parts import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
)
from expertd_inference.execution.recognize import FeedForwardSpec, LinearSpec, NormSpec
from expertd_inference.execution.rotation import Angles
from expertd_inference.execution.segment import ExpertsRest, ModuleRest, ProgramSegment, Rest
from expertd_inference.experts.call import seat_of
from expertd_inference.kernels.cpu.library import TYPES, native_activation
from expertd_inference.kernels.cpu.operations import (
    ActivateCall,
    AddCall,
    EmbedCall,
    GateCall,
    GatherCall,
    NormCall,
    ProductCall,
    RotateCall,
    RouteCall,
    ScaleCall,
)
from expertd_inference.kernels.cpu.program import Call, RowsProgram
from expertd_inference.kernels.cpu.structures import AttentionCall, NativeMatrix
from expertd_inference.kernels.wave import Routed


class Assembly:
    """Programs of a model, and the memory that they work on.

    ``stream`` [most rows, H] is the residual stream.
    """

    def __init__(self, model: ModelSpec, max_rows: int, max_wanted: int) -> None:
        """Of at most ``max_rows`` rows, of which ``max_wanted`` give logits at once."""
        self.dtype = model.embedding.dtype
        self._type = TYPES[self.dtype]
        self._keep: list[object] = [model]
        self._memory: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._max_rows = max_rows
        self.attention: list[AttentionCall] = []
        """One for each layer; their ``keys`` and ``values`` are the caller's to set."""
        self.angles: dict[int, Angles] = {}
        width = model.embedding.shape[1]
        self.stream = self._rows("stream", width)
        self.entry = RowsProgram()
        """From tokens to the stream."""
        self._program = self.entry
        self._add(
            EmbedCall(
                self._weight(model.embedding),
                self.stream.data_ptr(),
                width * model.embedding.element_size(),
            )
        )
        self._scale(self.stream, self.stream, model.embedding_scale)
        self.head = RowsProgram()
        """From the stream to logits."""
        self.logits = torch.empty(max_wanted, model.head.matrix.rows, dtype=self.dtype)
        self._assemble_head(model, torch.empty(max_wanted, width, dtype=self.dtype))

    def segments(
        self, layers: Sequence[LayerSpec], first: RowsProgram, step: int
    ) -> tuple[list[ProgramSegment], RowsProgram]:
        """``layers`` after what ``first`` has: segments, and what is left after the last.

        ``step`` is the address of the :class:`.StepCall` that all of them compute.
        """
        self._segments: list[ProgramSegment] = []
        self._program, self._step = first, step
        for layer in layers:
            self._attend(layer)
            self._feed_forward(layer)
        return self._segments, self._program

    def _assemble_head(self, model: ModelSpec, picked: Tensor) -> None:
        self._program = self.head
        self._keep.append(picked)
        row_bytes = picked.shape[1] * picked.element_size()
        self._add(GatherCall(self.stream.data_ptr(), picked.data_ptr(), row_bytes), wanted=True)
        self._norm(model.norm, picked, picked, wanted=True)
        self._linear(model.head, picked, self.logits, wanted=True)
        self._bias(model.head, self.logits, wanted=True)
        if model.logits_divisor != 1:
            self._add(
                ScaleCall(
                    *(self.logits.data_ptr(), self.logits.data_ptr(), self.logits.shape[1]),
                    *(model.logits_divisor, 1, self._type, 0),
                ),
                wanted=True,
            )

    def _attend(self, layer: LayerSpec) -> None:
        part = layer.attention
        entered = self._normed(layer.before_attention)
        widths = part.heads * part.key_width, part.kv_heads * part.key_width
        query, key = (
            self._rows(name, width) for name, width in zip(("query", "key"), widths, strict=True)
        )
        value = self._rows("value", part.kv_heads * part.value_width)
        projections = ((part.query, query), (part.key, key), (part.value, value))
        for number, (linear, out) in enumerate(projections):
            self._linear(linear, entered, out, beside=number > 0)
        for linear, out in projections:
            self._bias(linear, out)
        for norm, rows in ((part.query_norm, query), (part.key_norm, key)):
            if norm is not None:
                self._norm(norm, rows, rows)
        for rows, heads in ((query, part.heads), (key, part.kv_heads)):
            self._rotate(part, rows, heads)
        attended = self._rows("attended", part.heads * part.value_width)
        self._attention(part, query, key, value, attended)
        projected = self._rows("projected", self.stream.shape[1])
        self._linear(part.output, attended, projected)
        self._bias(part.output, projected)
        self._join(projected.data_ptr(), layer.after_attention, layer.multiplier)

    def _feed_forward(self, layer: LayerSpec) -> None:
        entered = self._normed(layer.before_feed_forward)
        part = layer.feed_forward
        join = layer.after_feed_forward, layer.multiplier
        if isinstance(part, FeedForwardSpec):
            self._join(self._gated(part, entered, "projected").data_ptr(), *join)
        elif isinstance(part, MoeSpec):
            self._experts(part, entered, join)
        else:
            self._stop(ModuleRest(part, entered))
            self._join(None, *join)

    def _experts(self, part: MoeSpec, entered: Tensor, join: tuple[NormSpec | None, float]) -> None:
        router, num = part.router, part.router.matrix.rows
        logits_dtype = torch.float32 if router.float_logits else self.dtype
        logits = self._rows("router logits", num, logits_dtype)
        index = self._rows("index", router.k, torch.int64)
        weights = self._rows("weights", router.k, router.weights_dtype)
        self._product(router.matrix, entered, logits)
        shared = None
        if part.shared is not None:
            parts = self._gate_and_up(part.shared, entered, beside=True)
        if part.shared_gate is not None:
            gate = self._rows("shared gate", part.shared_gate.matrix.rows)
            self._linear(part.shared_gate, entered, gate, beside=True)
            self._bias(part.shared_gate, gate)
        self._add(
            RouteCall(
                *(logits.data_ptr(), weights.data_ptr(), index.data_ptr()),
                None if router.bias is None else self._weight(router.bias),
                *(num, router.k, router.groups, router.top_groups),
                *(router.kind, router.normalize, TYPES[logits_dtype], TYPES[weights.dtype]),
                *(router.scale, 0),
            )
        )
        if part.shared is not None:
            shared = self._down(part.shared, parts, "shared")
            if part.shared_gate is not None:
                self._add(
                    GateCall(
                        *(shared.data_ptr(), gate.data_ptr(), shared.data_ptr()),
                        *(shared.shape[1], gate.shape[1], self._type, 0),
                    )
                )
        self._stop(ExpertsRest(seat_of(part.module), Routed(entered, index, weights)))
        if shared is None:
            self._join(None, *join)
        else:
            both = self._rows("projected", shared.shape[1])
            add = AddCall(
                0, shared.data_ptr(), both.data_ptr(), *[shared.shape[1]] * 2, self._type, 0
            )
            self._add(add)
            self._reads(add, "x")
            self._join(both.data_ptr(), *join)

    def _gated(self, part: FeedForwardSpec, entered: Tensor, out: str) -> Tensor:
        return self._down(part, self._gate_and_up(part, entered), out)

    def _gate_and_up(
        self, part: FeedForwardSpec, entered: Tensor, *, beside: bool = False
    ) -> tuple[Tensor, Tensor]:
        gate, up = (self._rows(name, part.gate.matrix.rows) for name in ("gate", "up"))
        self._linear(part.gate, entered, gate, beside=beside)
        self._linear(part.up, entered, up, beside=True)
        return gate, up

    def _down(self, part: FeedForwardSpec, parts: tuple[Tensor, Tensor], out: str) -> Tensor:
        gate, up = parts
        self._bias(part.gate, gate)
        self._bias(part.up, up)
        self._add(
            ActivateCall(
                *(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.shape[1]),
                native_activation(part.activation),
                self._type,
            )
        )
        result = self._rows(out, part.down.matrix.rows)
        self._linear(part.down, gate, result)
        self._bias(part.down, result)
        return result

    def _stop(self, rest: Rest) -> None:
        self._segments.append(ProgramSegment(self._program, rest, self._step))
        self._program = RowsProgram()

    def _reads(self, call: ctypes.Structure, field: str) -> None:
        """``call`` reads by ``field`` what the last segment's rest gives."""
        self._segments[-1].reader, self._segments[-1].field = call, field

    def _join(self, result: int | None, norm: NormSpec | None, multiplier: float) -> None:
        """Adds to the stream what is at ``result``, or what the last segment's rest gives."""
        width = self.stream.shape[1]
        projected = self._rows("projected", width)
        if norm is not None:
            call: Call = self._norm_call(norm, projected, projected)
            self._add(call, x=result)
            result = self._read_once(call, "x", result, projected)
        if multiplier != 1:
            call = ScaleCall(0, projected.data_ptr(), width, multiplier, 0, self._type, 0)
            self._add(call, x=result)
            result = self._read_once(call, "x", result, projected)
        stream = self.stream.data_ptr()
        call = AddCall(stream, 0, stream, width, width, self._type, 0)
        self._add(call, y=result)
        self._read_once(call, "y", result, projected)

    def _read_once(
        self, call: ctypes.Structure, field: str, result: int | None, projected: Tensor
    ) -> int:
        if result is None:
            self._reads(call, field)
        return projected.data_ptr()

    def _attention(
        self, part: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        sinks = 0 if part.sinks is None else self._weight(part.sinks)
        call = AttentionCall(
            *(0, query.data_ptr(), key.data_ptr(), value.data_ptr(), 0, 0, out.data_ptr(), sinks),
            *(part.heads, part.kv_heads, part.key_width, part.value_width),
            *(query.shape[1], part.key_width, key.shape[1], part.key_width),
            *(value.shape[1], part.value_width, out.shape[1], part.value_width),
            *(part.window or 0, part.scale, part.softcap or 0, self._type, 0),
        )
        self._add(call)
        self.attention.append(call)

    def _rotate(self, part: AttentionSpec, rows: Tensor, heads: int) -> None:
        rotation = part.rotation
        if rotation is None:
            return
        angles = self.angles.setdefault(id(rotation), Angles(rotation))
        call = RotateCall(
            *(rows.data_ptr(), 0, 0, heads, part.key_width, rotation.turned),
            *(rotation.pairs, self._type),
        )
        angles.add(call)
        self._add(call)

    def _normed(self, norm: NormSpec | None) -> Tensor:
        """The stream, normed if it is."""
        if norm is None:
            return self.stream
        normed = self._rows("normed", self.stream.shape[1])
        self._norm(norm, self.stream, normed)
        return normed

    def _norm(self, norm: NormSpec, x: Tensor, out: Tensor, *, wanted: bool = False) -> None:
        self._add(self._norm_call(norm, x, out), wanted=wanted)

    def _norm_call(self, norm: NormSpec, x: Tensor, out: Tensor) -> NormCall:
        n = len(norm.weight)
        return NormCall(
            *(x.data_ptr(), self._weight(norm.weight)),
            None if norm.bias is None else self._weight(norm.bias),
            *(out.data_ptr(), x.shape[1] // n, n, norm.eps, norm.kind, self._type, 0),
        )

    def _linear(
        self,
        linear: LinearSpec,
        x: Tensor,
        out: Tensor,
        *,
        beside: bool = False,
        wanted: bool = False,
    ) -> None:
        """The product; see :meth:`_bias`."""
        self._keep.append(linear)
        self._product(linear.matrix, x, out, beside=beside, wanted=wanted)

    def _product(
        self,
        matrix: NativeMatrix,
        x: Tensor,
        out: Tensor,
        *,
        beside: bool = False,
        wanted: bool = False,
    ) -> None:
        self._keep.append(matrix)
        call = ProductCall(
            *(ctypes.addressof(matrix), x.data_ptr(), out.data_ptr()),
            *(TYPES[x.dtype], TYPES[out.dtype]),
        )
        self._add(call, beside=beside, wanted=wanted)

    def _bias(self, linear: LinearSpec, out: Tensor, *, wanted: bool = False) -> None:
        """That is added to the rounded product."""
        if linear.bias is not None:
            n = out.shape[1]
            call = AddCall(
                *(out.data_ptr(), self._weight(linear.bias), out.data_ptr(), n, 0, self._type, 0)
            )
            self._add(call, wanted=wanted)

    def _scale(self, x: Tensor, out: Tensor, factor: float) -> None:
        if factor != 1:
            self._add(ScaleCall(x.data_ptr(), out.data_ptr(), x.shape[1], factor, 0, self._type, 0))

    def _add(
        self, call: Call, *, beside: bool = False, wanted: bool = False, **places: int | None
    ) -> None:
        for name, place in places.items():
            if place is not None:
                setattr(call, name, place)
        self._program.add(call, beside=beside, wanted=wanted)

    def _rows(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of rows, shared by all that call it so."""
        key = name, width, dtype or self.dtype
        if key not in self._memory:
            self._memory[key] = torch.empty(self._max_rows, width, dtype=key[2])
        return self._memory[key]

    def _weight(self, weight: Tensor) -> int:
        self._keep.append(weight)
        return weight.data_ptr()
