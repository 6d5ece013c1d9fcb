"""The native kernels: a MoE layer, or a linear layer, in one call of C++.

Weights are decoded in registers and multiplied there. Where torch's product is faster, which many
rows may make it (:mod:`.switching`), tiles of the matrix are dequantized into a scratch tensor and
multiplied by torch.

Rounding points are the reference's, the weights are exacter: where the reference rounds a
dequantized weight to the activations' type, the fused kernels keep it in float32. A result
depends neither on the number of threads nor on which experts come in one call.
"""

import ctypes
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from expertd_inference.kernels.cpu import reference
from expertd_inference.kernels.cpu.library import (
    EIGHT_BIT_ACTIVATIONS,
    EXACT,
    TYPES,
    check_memory,
    describe,
    native_layer,
    native_library,
    native_matrix,
)
from expertd_inference.kernels.cpu.reference import sum_slots
from expertd_inference.kernels.cpu.structures import (
    LinearCall,
    NativeExpertsCall,
    NativeLayer,
    NativeMatrix,
)
from expertd_inference.kernels.cpu.switching import LEAST, MostRows, Switching, any_number
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.errors import PreconditionError
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.layout import (
    DOWN,
    ROWS_PER_BYTE,
    Encoding,
    Matrix,
    has_float_scales,
    matrix_parts,
    scale_part,
)

TILE_BYTES = 8 << 20
"""Of dequantized weights at a time: they stay in the cache until they are multiplied."""
MAX_SUMMED = 15
"""Up to here torch, too, adds up a token's slots one after the other."""


class NativeKernels:
    """The kernels of the library; what they do not know is computed by the reference.

    With ``exact`` the reference computes that one row at a time, which is slow.
    """

    name = "native"

    def __init__(
        self, *, activations: int = 16, exact: bool = False, most_rows: MostRows | None = None
    ) -> None:
        """Raises PreconditionError if the library is not there.

        ``activations`` is how many bits rows of several have that meet quantized weights, 16 or 8;
        with ``exact`` the bits of a result do not depend on the number of rows, even if it is 1.
        ``most_rows`` says how many rows of an expert or a linear layer are computed here, and not
        by torch; by default it is measured on this host. With ``exact`` all are.
        """
        loaded = native_library()
        if loaded.library is None:
            raise PreconditionError(f"There are no native kernels: {loaded.reason}.")
        self._library: Any = loaded.library
        self.flags = flags_of(activations, exact=exact)
        self._exact = exact
        # By id: a spec's hash is that of all its parts. The spec is kept, so its id stays its.
        self._layers: dict[int, tuple[ExpertsSpec, NativeLayer | None]] = {}
        self._matrices: WeakKeyDictionary[QuantizedWeight, NativeMatrix | None]
        self._matrices = WeakKeyDictionary()
        self.most_rows = any_number if exact else most_rows or measured(activations)
        """As the argument."""

    def fill_slots(self, slots: Tensor, routed: Routed, wave: Wave, /) -> None:
        """As :func:`.reference.fill_slots`."""
        self._run(slots, None, routed, wave)

    def output(
        self, routed: Routed, wave: Wave, prepared: "PreparedExperts | None" = None, /
    ) -> Tensor:  # [T, H]
        """Fills the slots of the wave's experts, which are all there are, and sums them.

        The same bits as :meth:`fill_slots` in waves and :func:`.reference.sum_slots`. With what
        :meth:`prepare` made for ``routed``, of which no row may then name "none", the result is
        good until the next call with it.
        """
        if prepared is not None:
            prepared.fill(wave)
            check_memory(self._library.expertd_experts(prepared.address))
            return prepared.out
        slots = routed.empty_slots()
        out = torch.empty_like(routed.rows) if routed.top_k <= MAX_SUMMED else None
        summed = self._run(slots, out, routed, wave)
        return out if summed and out is not None else sum_slots(slots, routed.rows.dtype)

    def knows(self, spec: ExpertsSpec, dtype: torch.dtype) -> bool:
        """Whether native code computes such experts for rows of ``dtype``."""
        return self._layer(spec) is not None and dtype in TYPES

    def prepare(self, routed: Routed, spec: ExpertsSpec, /) -> "PreparedExperts | None":
        """The call for tensors that stay, or None if the layer or the tensors need another way."""
        layer = self._layer(spec)
        types = _types(routed, routed.empty_slots())
        if (
            layer is None
            or types is None
            or self._most_rows_of(spec, routed) is not None
            or routed.top_k > MAX_SUMMED
            or routed.index.dtype != torch.int64
            or routed.rows.shape[1] != layer.gate_up.columns
            or not all(each.is_contiguous() for each in (routed.rows, routed.index, routed.weights))
        ):
            return None
        return PreparedExperts(layer, routed, types, self.flags)

    def linear(self, rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
        """``rows`` [..., in] times the weight: [..., out], rounded once."""
        try:
            matrix = self._matrices[weight]
        except KeyError:
            matrix = self._matrices[weight] = matrix_of(weight)
        kind = TYPES.get(rows.dtype)
        if matrix is None or kind is None or not rows.is_cpu:
            return reference.linear(rows, weight, row_by_row=self._exact)
        in_features = weight.matrix.in_features
        if rows.shape[-1] != in_features:
            raise RuntimeError(
                f"{weight.matrix.name} has {in_features} inputs, and rows {rows.shape[-1]}"
            )
        num_rows = rows.numel() // in_features
        if num_rows > LEAST and _more(num_rows, self.most_rows(weight.matrix, rows.dtype)):
            flat = self._tiled(rows.reshape(num_rows, in_features), weight.matrix, matrix, 0)
            return flat.view(*rows.shape[:-1], weight.matrix.out_features)
        return multiply(self._library, rows.contiguous(), matrix, self.flags)

    def plain(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Contiguous ``rows`` [n, in] times a contiguous ``weight`` [out, in]: [n, out]."""
        return multiply(self._library, rows, describe(weight), self.flags)

    def _run(self, slots: Tensor, out: Tensor | None, routed: Routed, wave: Wave) -> bool:
        """Fills ``slots``, and sums them into ``out`` if it is given: True if it did that."""
        layer = self._layer(wave.spec)
        types = _types(routed, slots)
        if layer is None or types is None or not slots.is_contiguous():
            reference.fill_slots(slots, routed, wave, row_by_row=self._exact)
            return False
        if routed.rows.shape[1] != layer.gate_up.columns or len(wave.experts) != len(wave.records):
            raise RuntimeError(f"hidden states of {routed.rows.shape[1]} do not fit the records")
        most = self._most_rows_of(wave.spec, routed)
        if most is not None:
            wave = self._fill_large(slots, routed, wave, layer, most)
        # Held until the call is done: what contiguous() returns may be a copy.
        rows, weights = routed.rows.contiguous(), routed.weights.contiguous()
        index = routed.index.to(torch.int64).contiguous()
        num_experts = len(wave.experts)
        numbers = (ctypes.c_int64 * (2 * num_experts))(*wave.experts, *wave.records)
        address = ctypes.addressof(numbers)
        call = NativeExpertsCall(
            ctypes.addressof(layer),
            wave.arena.address,
            address,
            address + 8 * num_experts,
            rows.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            slots.data_ptr(),
            None if out is None else out.data_ptr(),
            num_experts,
            *index.shape,
            *types,
            torch.get_num_threads(),
            self.flags,
        )
        check_memory(self._library.expertd_experts(ctypes.addressof(call)))
        return True

    def _layer(self, spec: ExpertsSpec) -> NativeLayer | None:
        found = self._layers.get(id(spec))
        if found is None:
            found = self._layers[id(spec)] = (spec, native_layer(spec))
        return found[1]

    def _most_rows_of(self, spec: ExpertsSpec, routed: Routed) -> int | None:
        """How many rows an expert may have to be computed here; None if none can have more."""
        if len(routed) <= LEAST:
            return None
        most = self.most_rows(spec.layout.inward, routed.rows.dtype)
        return most if _more(len(routed), most) else None

    def _fill_large(
        self, slots: Tensor, routed: Routed, wave: Wave, layer: NativeLayer, most: int
    ) -> Wave:
        """Computes the experts that have more rows; the wave of those that are left."""
        index, spec = routed.index, wave.spec
        counts = torch.bincount(index.flatten(), minlength=max(wave.experts, default=0) + 1)
        few: set[int] = set()
        for expert, record in zip(wave.experts, wave.records, strict=True):
            if counts[expert] <= most:
                few.add(expert)
                continue
            token, position = torch.where(index == expert)  # [n] each
            inward = spec.layout.inward.name
            inner = spec.activate(
                self._large(routed.rows[token], inward, layer.gate_up, record, wave)
            )
            result = self._large(inner, DOWN, layer.down, record, wave)
            slots[token, position] = result * routed.weights[token, position, None]
        return wave.only(few)

    def _large(
        self, rows: Tensor, name: str, native: NativeMatrix, record: int, wave: Wave
    ) -> Tensor:
        spec, arena = wave.spec, wave.arena
        matrix = spec.layout.matrix(name)
        if matrix.encoding is Encoding.PLAIN:
            weight = arena.part(record, spec.layout.part(f"{name}.weight"))
            result = functional.linear(rows, weight.to(rows.dtype))
        else:
            result = self._tiled(rows, matrix, native, arena.address + record)
        if native.bias < 0:
            return result
        return result + arena.part(record, spec.layout.part(f"{name}.bias")).to(rows.dtype)

    def _tiled(self, rows: Tensor, matrix: Matrix, native: NativeMatrix, base: int) -> Tensor:
        """``rows`` [n, in] times a quantized matrix, tile by tile: [n, out]."""
        rows = rows.contiguous()
        per_unit = ROWS_PER_BYTE[matrix.bits]
        num_units = matrix.out_features // per_unit
        unit_bytes = per_unit * matrix.in_features * rows.element_size()
        at_once = min(num_units, max(1, TILE_BYTES // unit_bytes))
        # A tile's rows are those of its units, in as many strips as a unit has rows.
        tile = rows.new_empty(per_unit * at_once, matrix.in_features)
        out = rows.new_empty(len(rows), per_unit, num_units)
        for first in range(0, num_units, at_once):
            last = min(num_units, first + at_once)
            status = self._library.expertd_dequantize(
                ctypes.addressof(native),
                base,
                first,
                last,
                tile.data_ptr(),
                TYPES[rows.dtype],
                torch.get_num_threads(),
            )
            check_memory(status)
            product = functional.linear(rows, tile[: per_unit * (last - first)])
            out[:, :, first:last] = product.view(len(rows), per_unit, last - first)
        return out.view(len(rows), matrix.out_features)


class PreparedExperts:
    """A layer's call for tensors that stay where they are: making it takes longer than calling."""

    def __init__(
        self, layer: NativeLayer, routed: Routed, types: Sequence[int], flags: int
    ) -> None:
        """``routed`` is kept, and read at every call; ``types`` are those of its tensors."""
        self._kept = layer, routed
        self.out = torch.empty_like(routed.rows)
        """The result [T, H], of the last call."""
        self._slots = routed.empty_slots()
        self._most = routed.index.numel()
        self._numbers = (ctypes.c_int64 * (2 * self._most))()
        numbers = ctypes.addressof(self._numbers)
        tensors = (routed.rows, routed.index, routed.weights, self._slots, self.out)
        self._call = NativeExpertsCall(
            *(ctypes.addressof(layer), 0, numbers, numbers + 8 * self._most),
            *(tensor.data_ptr() for tensor in tensors),
            *(self._most, *routed.index.shape),
            *types,
            *(0, flags),
        )
        self.address = ctypes.addressof(self._call)

    def fill(self, wave: Wave) -> None:
        """Puts in what changes: the experts, at most one for each number of the routing."""
        num, most = len(wave.experts), self._most
        self._numbers[:num] = [*wave.experts]
        self._numbers[most : most + num] = [*wave.records]
        self._call.num_experts = num
        self._call.arena = wave.arena.address
        self._call.threads = torch.get_num_threads()


def _types(routed: Routed, slots: Tensor) -> list[int] | None:
    """The types of rows, weights and slots as the library numbers them; None for others."""
    types = [TYPES.get(each.dtype) for each in (routed.rows, routed.weights, slots)]
    known = [each for each in types if each is not None]
    return known if len(known) == len(types) else None


@cache
def measured(activations: int = 16) -> Switching:
    """Where torch's products are faster on this host. Raises as :class:`NativeKernels`."""
    ours = NativeKernels(activations=activations, most_rows=any_number)
    torchs = NativeKernels(activations=activations, most_rows=lambda _, __: 0)

    def product(kernels: NativeKernels, matrix: Matrix, rows: Tensor) -> Tensor:
        weight = _some_weight(matrix, rows.dtype)
        if matrix.encoding is not Encoding.PLAIN:
            return kernels.linear(rows, weight)
        plain = weight.parts[f"{matrix.name}.weight"]
        return functional.linear(rows, plain) if kernels is torchs else ours.plain(rows, plain)

    return Switching(
        partial(product, ours),
        partial(product, torchs),
        f"{_processor()} {isa()} torch {torch.__version__} {activations}-bit activations",
    )


@lru_cache(maxsize=1)
def _some_weight(matrix: Matrix, dtype: torch.dtype) -> QuantizedWeight:
    """A weight of that form, plain ones of the dtype."""
    dtypes = TORCH_DTYPES | {"": dtype}
    parts = {
        name: torch.ones(shape, dtype=dtypes[kind])
        for name, shape, kind in matrix_parts(matrix, "")
    }
    return QuantizedWeight(matrix, parts)


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _more(num_rows: int, most: int | None) -> bool:
    return most is not None and num_rows > most


def flags_of(activations: int, *, exact: bool) -> int:
    """Of a call, as :class:`NativeKernels` has them."""
    if activations not in (8, 16):
        raise ValueError(f"activations have 8 or 16 bits, not {activations}")
    return exact * EXACT | (activations == 8) * EIGHT_BIT_ACTIVATIONS


def multiply(library: Any, rows: Tensor, matrix: NativeMatrix, flags: int) -> Tensor:  # noqa: ANN401
    """Contiguous ``rows`` [..., in], of a dtype of TYPES, times the matrix: [..., out]."""
    out = rows.new_empty(*rows.shape[:-1], matrix.rows)
    call = LinearCall(
        ctypes.addressof(matrix),
        rows.data_ptr(),
        out.data_ptr(),
        rows.numel() // matrix.columns,
        TYPES[rows.dtype],
        torch.get_num_threads(),
        flags,
    )
    check_memory(library.expertd_linear(ctypes.addressof(call)))
    return out


def isa() -> str:
    """The instruction set in use; empty without the library."""
    library = native_library().library
    return "" if library is None else str(library.expertd_isa().decode())


def use_isa(name: str | None) -> str | None:
    """Makes one instruction set that of all later calls, None the best; its name.

    Returns None, and changes nothing, where it does not exist. For tests and benchmarks.
    """
    library = native_library().library
    if library is None:
        return None
    used: bytes | None = library.expertd_use_isa(None if name is None else name.encode())
    return None if used is None else used.decode()


def read_memory(
    address: int, num_bytes: int, threads: int, streams: int = 4, ahead: int = 0
) -> None:
    """Reads memory and does nothing else: what the kernels' rates are compared with.

    In lines of 64 bytes at ``streams`` (1, 2 or 4) places at once, each with a prefetch ``ahead``
    bytes ahead unless that is 0. Raises PreconditionError if the library is not there.
    """
    loaded = native_library()
    if loaded.library is None:
        raise PreconditionError(f"There are no native kernels: {loaded.reason}.")
    loaded.library.expertd_read_probe(address, num_bytes, streams, ahead, threads)


def matrix_of(weight: QuantizedWeight) -> NativeMatrix | None:
    """The weight for the kernels, or None if they do not know it. It must outlive the result."""
    parts = weight.parts.values()
    if not all(part.is_cpu and part.is_contiguous() for part in parts):
        return None
    scales = "F16"
    if has_float_scales(weight.matrix):
        dtype = weight.parts[scale_part(weight.matrix)].dtype
        scales = "BF16" if dtype == torch.bfloat16 else "F16"
    return native_matrix(
        weight.matrix, lambda name: weight.parts[name].data_ptr(), "", scales=scales
    )
