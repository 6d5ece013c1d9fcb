"""A step of one token of a lean model as a few native calls, one per layer and one at the end.

Between the products of a decoding step Python costs more than the small operations themselves.
Here the modules of a model are read once, and what they do to one token is written down as
operations on fixed memory (``kernels.cpu.program``): from the sum after one layer's experts to
the routing of the next. Only the experts are still called as the model calls them, since which of
them are in RAM is for Python to find out.

Reading is no proof that a model does nothing else. Whoever uses a program rehearses it first
(:mod:`.rehearsal`). What is not built of known parts is refused, and runs by its modules.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.execution.known_parts import (
    UnknownPartError,
    check_layer,
    check_plain,
    growing_layers,
    norm_weight,
)
from expertd_inference.execution.lean import KERNELS
from expertd_inference.experts.call import has_seat, seat_of
from expertd_inference.kernels.cpu.library import TYPES, LinearCall, NativeMatrix
from expertd_inference.kernels.cpu.program import (
    AddCall,
    AttendCall,
    EmbedCall,
    NormCall,
    Program,
    RouteCall,
)
from expertd_inference.kernels.cpu.step import DTYPES, StepKernels, describe
from expertd_inference.kv.growing import GrowingLayer
from expertd_inference.model.quantized_linear import QuantizedLinear

_EXPERTS = {"gate", "experts"}


@dataclass
class _Stretch:
    """What runs in one call, and what the model computes after it: the rest of a layer."""

    program: Program
    rest: Callable[[], Tensor]
    sum: AddCall
    """Of the next stretch, which adds the rest's result to ``entered``, the residual stream."""
    entered: Tensor
    result: Tensor | None = None
    """The rest's last one: kept since the next stretch reads it."""

    def take(self, result: Tensor) -> None:
        """Lets the next stretch read ``result``. Raises UnknownPartError if it is no such row."""
        if (
            not isinstance(result, Tensor)
            or result.dtype is not self.entered.dtype
            or result.numel() != self.entered.numel()
            or not result.is_contiguous()
        ):
            raise UnknownPartError("a layer gives something else than a row for one token")
        self.result = result
        self.sum.y = result.data_ptr()


class DecodeProgram:
    """The tokens of one sequence, each of them a :meth:`step`; for one thread at a time."""

    def __init__(self, model: Any, cache: Any, tokens: int) -> None:  # noqa: ANN401 - untyped
        """``cache`` holds keys and values of at least ``tokens``; the rest is overwritten.

        Raises UnknownPartError.
        """
        kernels = model.__dict__.get(KERNELS)
        if kernels is None:
            raise UnknownPartError("its modules are not native")
        check_plain(model)
        self._kernels: StepKernels = kernels
        self.tokens = tokens
        """How many it has keys and values of."""
        self._keep: list[object] = []
        self.fingerprint: list[int] = []
        """Where the weights are that it computes with."""
        body = model.model
        table = body.embed_tokens.weight
        if type(body.embed_tokens) is not nn.Embedding or table.dtype not in DTYPES:
            raise UnknownPartError("its embedding is not a plain one")
        self._dtype, self._type = table.dtype, TYPES[table.dtype]
        self._num_tokens = len(table)
        self._rotary = body.rotary_emb
        self._position = torch.full((1, 1), tokens)
        angles = self._rotary(table[:1, None], self._position)
        if not isinstance(angles, tuple) or any(x.dtype != self._dtype for x in angles):
            raise UnknownPartError("its positions are told otherwise than by angles")
        self._angles = angles[0].new_empty(2, angles[0].shape[-1])
        self._caches: list[GrowingLayer] = growing_layers(cache, len(body.layers))
        self._attends: list[AttendCall] = []
        self._stretches: list[_Stretch] = []
        # What enters a layer, what leaves its attention, and this normed, for the experts.
        self._entered, self._middle, self._normed = (self._row(table.shape[1]) for _ in range(3))
        program = Program()
        program.add(
            EmbedCall(
                self._weight(table),
                self._entered.data_ptr(),
                table.shape[1] * table.element_size(),
            )
        )
        for layer in body.layers:
            self._add_attention(program, layer)
            rest = self._add_routing(program, layer.mlp)
            addend = AddCall(
                self._middle.data_ptr(), 0, self._entered.data_ptr(), table.shape[1], self._type
            )
            self._stretches.append(_Stretch(program, rest, addend, self._entered))
            program = Program()
            program.add(addend)
        self._last = program
        self._add_norm(program, body.norm, self._entered, self._normed)
        self._head: Callable[[Tensor], Tensor] | None = model.lm_head
        self._logits = self._normed
        if hasattr(model.lm_head, "expertd_prepared"):
            self._logits = self._row(model.lm_head.out_features)
            self._add_linear(program, model.lm_head, self._normed, self._logits)
            self._add_bias(program, model.lm_head, self._logits)
            self._head = None
        self._reserve(tokens + 1)

    def step(self, token: int) -> Tensor:
        """The logits [1, vocabulary] after one more ``token``; good until the next step.

        Raises IndexError for what is no token, and what the experts raise.
        """
        if not 0 <= token < self._num_tokens:
            raise IndexError(f"token {token} is none of {self._num_tokens}")
        position = self.tokens
        if position == self._room:
            self.show()
            self._reserve(position + 1)
        self._position.fill_(position)
        cos, sin = self._rotary(self._entered, self._position)
        self._angles[0].copy_(cos[0, 0])
        self._angles[1].copy_(sin[0, 0])
        run = self._kernels.run
        for stretch in self._stretches:
            run(stretch.program, token, position)
            result = stretch.rest()
            if result is not stretch.result:
                stretch.take(result)
        run(self._last, token, position)
        self.tokens += 1
        return self._logits if self._head is None else self._head(self._normed)

    def show(self) -> None:
        """Lets the cache have the tokens of all completed steps, as if modules had run."""
        for layer in self._caches:
            layer.show(self.tokens)

    def appended(self, position: int) -> list[Tensor]:
        """The keys and values of one token, of all layers."""
        rooms = [room for layer in self._caches for room in layer.reserve(position + 1)]
        return [room[:, :, position] for room in rooms]

    def _reserve(self, tokens: int) -> None:
        rooms = [layer.reserve(tokens) for layer in self._caches]
        self._room = min(room[0].shape[2] for room in rooms)
        for call, (keys, values) in zip(self._attends, rooms, strict=True):
            shape = (1, call.kv_heads, keys.shape[2], call.d)
            for room in (keys, values):
                if room.shape != shape or room.dtype != self._dtype or not room.is_contiguous():
                    raise UnknownPartError("its keys and values are of another form")
            call.keys, call.values, call.room = keys.data_ptr(), values.data_ptr(), keys.shape[2]

    def _add_attention(self, program: Program, layer: Any) -> None:  # noqa: ANN401 - untyped
        """From what enters the layer to what leaves its attention, and that normed."""
        check_layer(layer)
        attention = layer.self_attn
        d = attention.head_dim
        if self._angles.shape[1] != d or d % 2:
            raise UnknownPartError("it rotates a part of each head")
        self._add_norm(program, layer.input_layernorm, self._entered, self._normed)
        projections = [getattr(attention, f"{name}_proj") for name in "qkv"]
        query, key, value = (
            self._row(getattr(module, "out_features", 0)) for module in projections
        )
        for number, (module, out) in enumerate(zip(projections, (query, key, value), strict=True)):
            self._add_linear(program, module, self._normed, out, beside=number > 0)
        for module, out in zip(projections, (query, key, value), strict=True):
            self._add_bias(program, module, out)
        heads, kv_heads = query.numel() // d, key.numel() // d
        if heads % kv_heads or value.numel() != key.numel():
            raise UnknownPartError("its heads share keys otherwise")
        turned, attended = self._row(heads * d), self._row(heads * d)
        call = AttendCall(
            cos=self._angles[0].data_ptr(),
            sin=self._angles[1].data_ptr(),
            turned=turned.data_ptr(),
            out=attended.data_ptr(),
            heads=heads,
            kv_heads=kv_heads,
            d=d,
            scale=attention.scaling,
            type=self._type,
        )
        q_norm: Any = getattr(attention, "q_norm", None)
        k_norm: Any = getattr(attention, "k_norm", None)
        if (q_norm is None) != (k_norm is None):
            raise UnknownPartError("it norms queries or keys, and not both")
        if q_norm is not None and norm_weight(q_norm).numel() == d:
            call.q_weight, call.k_weight = (self._weight(norm_weight(x)) for x in (q_norm, k_norm))
            call.eps, call.round_first = q_norm.variance_epsilon, q_norm.expertd_round_first
            if (k_norm.variance_epsilon, k_norm.expertd_round_first, len(k_norm.weight)) != (
                *(q_norm.variance_epsilon, q_norm.expertd_round_first),
                d,
            ):
                raise UnknownPartError("it norms queries and keys each in its way")
        elif q_norm is not None:
            for name, norm in (("q", q_norm), ("k", k_norm)):
                before = query if name == "q" else key
                after = self._row(before.numel())
                self._add_norm(program, norm, before, after)
                if name == "q":
                    query = after
                else:
                    key = after
        call.q, call.k, call.v = query.data_ptr(), key.data_ptr(), value.data_ptr()
        program.add(call)
        self._attends.append(call)
        projected = self._row(self._entered.numel())
        self._add_linear(program, attention.o_proj, attended, projected)
        self._add_bias(program, attention.o_proj, projected)
        self._add_sum(program, self._entered, projected, self._middle)
        self._add_norm(program, layer.post_attention_layernorm, self._middle, self._normed)

    def _add_routing(self, program: Program, mlp: Any) -> Callable[[], Tensor]:  # noqa: ANN401
        """The choice of experts, where that is all there is beside them; what is left to do."""
        normed = self._normed
        gate: Any = getattr(mlp, "gate", None)
        experts: Any = getattr(mlp, "experts", None)
        plain = (
            {name for name, _ in mlp.named_children()} == _EXPERTS
            and hasattr(gate, "expertd_normalize")
            and has_seat(experts)
            and gate.weight.dtype == self._dtype
            and gate.weight.shape[1] == normed.numel()
        )
        if not plain:
            rows = normed.view(1, 1, -1)
            return lambda: mlp(rows)
        num_experts = len(gate.weight)
        logits = self._row(num_experts)
        float_weights: bool = gate.expertd_float_weights
        weights = torch.empty(1, gate.top_k, dtype=torch.float32 if float_weights else self._dtype)
        index = torch.empty(1, gate.top_k, dtype=torch.int64)
        self._keep += [weights, index]
        matrix = describe(gate.weight)
        self._weight(gate.weight)
        program.add(self._linear_call(matrix, normed, logits))
        program.add(
            RouteCall(
                *(tensor.data_ptr() for tensor in (logits, weights, index)),
                *(num_experts, gate.top_k, gate.expertd_normalize, float_weights, self._type),
            )
        )

        seat = seat_of(experts)
        call = seat.prepare(normed, index, weights)
        return lambda: seat.runner.run(call)

    def _add_norm(self, program: Program, norm: Any, x: Tensor, out: Tensor) -> None:  # noqa: ANN401
        weight = norm_weight(norm)
        if weight.numel() != x.numel() or weight.dtype != self._dtype:
            raise UnknownPartError(f"its {type(norm).__name__} is of another size")
        program.add(
            NormCall(
                *(x.data_ptr(), self._weight(weight), out.data_ptr(), 1, x.numel()),
                *(norm.variance_epsilon, norm.expertd_round_first, self._type),
            )
        )

    def _add_linear(
        self,
        program: Program,
        linear: Any,  # noqa: ANN401 - a module
        x: Tensor,
        out: Tensor,
        *,
        beside: bool = False,
    ) -> None:
        """The product, of a plain matrix with its bias; see :meth:`_add_bias`."""
        prepared = None
        if hasattr(linear, "expertd_prepared") and (x.numel(), out.numel()) == (
            linear.in_features,
            linear.out_features,
        ):
            prepared = linear.expertd_prepared()
        plain = isinstance(linear, nn.Linear)
        if prepared is None or (plain and linear.weight.dtype != self._dtype):
            raise UnknownPartError(f"a {type(linear).__name__} is not native")
        self._keep += [linear.weight, linear.bias] if plain else [linear.quantized]
        self.fingerprint += [prepared.matrix.weight, prepared.matrix.bias]
        program.add(self._linear_call(prepared.matrix, x, out), beside=beside)

    def _linear_call(self, matrix: NativeMatrix, x: Tensor, out: Tensor) -> LinearCall:
        self._keep.append(matrix)
        return LinearCall(ctypes.addressof(matrix), x.data_ptr(), out.data_ptr(), 1, self._type, 0)

    def _add_bias(self, program: Program, linear: Any, out: Tensor) -> None:  # noqa: ANN401
        """Of a quantized layer, which adds it to the rounded product."""
        if linear.bias is not None and isinstance(linear, QuantizedLinear):
            if linear.bias.dtype != self._dtype:
                raise UnknownPartError("a bias is of another type")
            self._keep.append(linear.bias)
            address = self._weight(linear.bias)
            program.add(AddCall(out.data_ptr(), address, out.data_ptr(), out.numel(), self._type))

    def _add_sum(self, program: Program, x: Tensor, y: Tensor, out: Tensor) -> None:
        program.add(AddCall(x.data_ptr(), y.data_ptr(), out.data_ptr(), out.numel(), self._type))

    def _row(self, size: int) -> Tensor:  # [1, size]
        row = torch.empty(1, size, dtype=self._dtype)
        self._keep.append(row)
        return row

    def _weight(self, weight: Tensor) -> int:
        if not weight.is_cpu or not weight.is_contiguous():
            raise UnknownPartError("a weight is not on the CPU, or has gaps")
        self._keep.append(weight)
        self.fingerprint.append(weight.data_ptr())
        return weight.data_ptr()
