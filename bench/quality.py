"""What quantizing costs in quality: Table 1 of Eliseev & Mazur (arXiv 2312.17238).

The example model (`examples/tiny-mixtral`, trained for real, 16 M weights) on text that it never
saw, in windows of its whole context, each token predicted from at least half of it: experts in 16,
4, 3 and 2 bits, attention in 16 and 4. Ours are packs, served by a daemon and computed by a worker
with its native kernels (experts in 16 bits with torch's operations, as a worker does by itself).
Beside each stands stock `hqq` on the same matrices: its own `Quantizer` decides at the same bits
and groups, of scales and zeros as well (8 bits, groups of 128), and what it dequantizes to is put
into the stock transformers model. Beside 16 bits stands that model as it is. Brackets are the
middle half of 2,000 bootstrap samples of the windows; of ratios, both models are scored on the
same samples.

What few bits cost is a model's own: read the example's increase beside hqq's, not beside the
paper's. Sizes are of files on disk: the example model's trunk is mostly embeddings, which are
never quantized, so its packs shrink less than Mixtral-8x7B's would. What the same schemes make of
Mixtral's shapes is computed (no such model was packed here), to stand beside the paper's sizes.

Example: python -m bench quality --quick --out /tmp/bench
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from bench.figures import Bench, Figure, quartiles
from bench.heldout import EXAMPLE, Heldout, read_heldout
from bench.results import Curve, Plot, Table
from bench.synthetic import plan_of
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import PLAIN, Precision, Scheme, choose_scheme, parse_precision
from expertd_inference.kernels.cpu.library import native_library
from expertd_testing.daemon import serving
from expertstore.pack.inspect import Inspection, inspect

_EXPERTS = ("16", "4g64m", "3g64m", "2g16m")
_ATTENTION = ("16", "4g64m")
_CONTEXT = 1024
_QUICK = (("16", "16"), ("2g16m", "4g64m"))
_QUICK_WINDOWS = 2
_MOST_RATIO = 1.005
"""Of perplexities: what chance does not explain, since both decide by one method."""

# Bits of attention and experts: GiB, perplexity on Wiki2 and C4, MMLU in %.
_PAPER: dict[tuple[int, int], tuple[float, float, float, float | None]] = {
    (16, 16): (86.99, 3.59, 6.52, 70.51),
    (4, 16): (85.16, 3.68, 6.59, None),
    (4, 4): (23.99, 3.76, 6.66, 69.11),
    (4, 3): (21.37, 4.05, 6.87, 68.47),
    (4, 2): (17.54, 4.61, 7.42, 65.58),
}

Combination = tuple[str, str]
"""Precisions of experts and attention."""


@dataclass(frozen=True)
class Measured:
    """One combination."""

    attention: str
    experts: str
    ours: Inspection
    num_bytes: int
    """Of our experts and trunk."""
    mixtral: tuple[int, int]
    """Bytes that the scheme makes of Mixtral-8x7B's experts and trunk, computed."""
    nats: npt.NDArray[np.float64]
    stock_nats: npt.NDArray[np.float64]
    """Of stock hqq, or of the stock model where nothing is quantized."""
    stock_bytes: int

    @property
    def name(self) -> str:
        """As the rows are called."""
        return f"experts {self.experts}, attention {self.attention}"


def measure(bench: Bench) -> Iterator[Figure | Table | Plot | str]:
    """Perplexities of all combinations, ours and hqq's; sizes; the paper's."""
    if native_library().library is None:
        yield f"the native kernels, so ours is torch's sums: {native_library().reason}"
    heldout = read_heldout(_CONTEXT, _QUICK_WINDOWS if bench.quick else None)
    combinations = [(experts, attention) for attention in _ATTENTION for experts in _EXPERTS]
    schemes = {
        (experts, attention): choose_scheme("bf16", experts, attention)
        for experts, attention in (_QUICK if bench.quick else combinations)
    }
    packs = {}
    for number, (combination, scheme) in enumerate(schemes.items()):
        bench.say(f"quality: packing {scheme.name}")
        packs[combination] = bench.folder / f"pack{number}"
        pack(Request(EXAMPLE, packs[combination], scheme))
    inspections = {combination: inspect(path) for combination, path in packs.items()}
    ours = dict(_ours(packs, inspections, heldout, bench))
    rows = []
    for (experts, attention), nats, num_bytes in _stock(list(schemes), heldout, bench):
        inspection = inspections[experts, attention]
        row = Measured(
            attention,
            experts,
            inspection,
            inspection.manifest.expert_bytes + inspection.manifest.trunk.num_bytes,
            _mixtral_bytes(schemes[experts, attention]),
            ours[experts, attention],
            nats,
            num_bytes,
        )
        rows.append(row)
        yield _figure(row, heldout)
    yield _table(rows, heldout)
    yield _paper_table()
    yield _plot(rows, heldout)


# --- ours -----------------------------------------------------------------------------------------


def _ours(
    packs: Mapping[Combination, Path],
    inspections: Mapping[Combination, Inspection],
    heldout: Heldout,
    bench: Bench,
) -> Iterator[tuple[Combination, npt.NDArray[np.float64]]]:
    """Nats per window of a worker on each pack, from a daemon that serves all of them."""
    from expertd_inference import load_model

    names = {combination: f"m{number}" for number, combination in enumerate(packs)}
    ram = sum(each.manifest.expert_bytes for each in inspections.values())
    with serving(
        {names[combination]: path for combination, path in packs.items()},
        ram=ram + (16 << 20),
        socket=bench.folder / "s",
    ) as daemon:
        for combination, name in names.items():
            model = load_model(name, socket=daemon.socket)
            try:
                label = f"quality: ours, experts {combination[0]}, attention {combination[1]}"
                yield combination, heldout.nats(model, _counting(bench, label, heldout))
            finally:
                model.expertd.close()


def _mixtral_bytes(scheme: Scheme) -> tuple[int, int]:
    *experts, trunk = (file.num_bytes for file in plan_of("mixtral-8x7b", scheme).files)
    return sum(experts), trunk


# --- stock hqq ------------------------------------------------------------------------------------


def _stock(
    combinations: list[Combination], heldout: Heldout, bench: Bench
) -> Iterator[tuple[Combination, npt.NDArray[np.float64], int]]:
    """Nats per window of the stock model, quantized and dequantized by hqq, and hqq's bytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16).eval()
    weights = {
        "experts": [p for name, p in model.named_parameters() if ".experts." in name],
        "attention": [
            p for name, p in model.named_parameters() if ".self_attn." in name and p.dim() == 2
        ],
    }
    rest = sum(2 * p.numel() for p in model.parameters()) - sum(
        2 * p.numel() for kind in weights.values() for p in kind
    )
    done: dict[tuple[str, str], tuple[list[Tensor], int]] = {}
    for kind, parameters in weights.items():
        for text in sorted({combination[kind == "attention"] for combination in combinations}):
            bench.say(f"quality: hqq, {kind} {text}")
            results = [_by_hqq(p.detach(), parse_precision(text)) for p in parameters]
            done[kind, text] = [weight for weight, _ in results], sum(size for _, size in results)
    for combination in combinations:
        size = rest
        for kind, text in zip(weights, combination, strict=True):
            values, num_bytes = done[kind, text]
            size += num_bytes
            for parameter, value in zip(weights[kind], values, strict=True):
                parameter.data.copy_(value)
        label = f"quality: stock, experts {combination[0]}, attention {combination[1]}"
        yield combination, heldout.nats(model, _counting(bench, label, heldout)), size


def _by_hqq(weight: Tensor, precision: Precision) -> tuple[Tensor, int]:
    """``weight`` [..., out, in] as hqq has it after dequantizing, in bf16, and its bytes."""
    if precision == PLAIN:
        return weight.clone(), weight.nbytes
    results = [_matrix_by_hqq(matrix, precision) for matrix in weight.view(-1, *weight.shape[-2:])]
    values = torch.stack([value for value, _ in results]).view(weight.shape)
    return values, sum(size for _, size in results)


def _matrix_by_hqq(matrix: Tensor, precision: Precision) -> tuple[Tensor, int]:
    packed, meta = _quantize(matrix, precision.bits, precision.group_size, optimize=True)
    num_bytes = packed.nbytes
    for which in ("scale", "zero"):
        values = meta[which].float()
        # Since HQQLinear no longer does what its settings say of scales and zeros.
        small, outer = _quantize(
            values.view(1, -1), 8, precision.meta_group_size or values.numel(), optimize=False
        )
        meta[which] = Quantizer.dequantize(small, outer).view(values.shape)
        num_bytes += small.nbytes + 2 * (outer["scale"].numel() + outer["zero"].numel())
    return Quantizer.dequantize(packed, meta).to(matrix.dtype), num_bytes


def _quantize(
    values: Tensor, bits: int, group_size: int, *, optimize: bool
) -> tuple[Tensor, dict[str, Any]]:
    packed, meta = Quantizer.quantize(
        values.float(),
        nbits=bits,
        group_size=group_size,
        optimize=optimize,
        axis=1,
        compute_dtype=torch.float32,
        device="cpu",
    )
    return packed, meta


# --- what is shown --------------------------------------------------------------------------------


def _counting(bench: Bench, label: str, heldout: Heldout) -> Callable[[int], None]:
    return lambda done: bench.say(f"{label}: {done} of {len(heldout.windows)}")


def _figure(row: Measured, heldout: Heldout) -> Figure:
    ours, stock = heldout.perplexity(row.nats), heldout.perplexity(row.stock_nats)
    low, high = quartiles(
        (heldout.resampled(row.nats) / heldout.resampled(row.stock_nats)).tolist()
    )
    plain = row.experts == row.attention == "16"
    return Figure(
        "quality",
        f"{row.name}: ours / {'stock transformers' if plain else 'hqq'}",
        "perplexity",
        ours,
        stock,
        ours / stock,
        low,
        high,
        f"ratio <= {_MOST_RATIO}",
        ours / stock <= _MOST_RATIO,
    )


def _table(rows: list[Measured], heldout: Heldout) -> Table:
    plain = rows[0].nats
    largest = sum(rows[0].mixtral)
    cells = []
    for row in rows:
        low, high = quartiles(heldout.resampled(row.nats).tolist())
        cells.append(
            (
                row.attention,
                row.experts,
                f"{row.ours.manifest.expert_bytes / (1 << 20):.1f}",
                f"{row.ours.manifest.trunk.num_bytes / (1 << 20):.1f}",
                f"{row.ours.expert_bits:.2f}",
                f"{row.ours.trunk_bits:.2f}",
                f"{heldout.perplexity(row.nats):.3f} ({low:.2f} to {high:.2f})",
                _increase(*_increases(heldout, row.nats, plain)),
                f"{sum(row.mixtral) / (1 << 30):.2f} ({sum(row.mixtral) / largest:.1%})",
            )
        )
    return Table(
        "The example model by its precisions, ours",
        (
            "attention",
            "experts",
            "experts, MiB",
            "trunk, MiB",
            "bits per expert weight",
            "bits per trunk weight",
            "held-out perplexity",
            "over 16 bits",
            "Mixtral-8x7B's shapes so, GiB: computed",
        ),
        tuple(cells),
        f"`4g64m` is 4 bits in groups of 64 with 8-bit scales and zeros. {heldout.num_tokens:,} of "
        f"{heldout.num_all:,} tokens scored, in {len(heldout.windows)} windows.",
    )


def _paper_table() -> Table:
    base = _PAPER[16, 16]
    return Table(
        "The paper's, of Mixtral-8x7B (published figures, not measured here)",
        ("attention", "experts", "GiB", "Wiki2", "over fp16", "C4", "over fp16", "MMLU, %"),
        tuple(
            (
                str(attention),
                str(experts),
                f"{size:.2f}",
                f"{wiki:.2f}",
                f"{wiki / base[1] - 1:+.1%}",
                f"{c4:.2f}",
                f"{c4 / base[2] - 1:+.1%}",
                "" if mmlu is None else f"{mmlu:.2f}",
            )
            for (attention, experts), (size, wiki, c4, mmlu) in _PAPER.items()
        ),
    )


def _increases(
    heldout: Heldout, nats: npt.NDArray[np.float64], plain: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """Of the perplexity over that of 16 bits in %, and its middle half."""
    low, high = quartiles((heldout.resampled(nats) / heldout.resampled(plain)).tolist())
    ratio = heldout.perplexity(nats) / heldout.perplexity(plain)
    return 100 * (ratio - 1), 100 * (low - 1), 100 * (high - 1)


def _increase(value: float, low: float, high: float) -> str:
    return f"{value:+.1f} % ({low:+.1f} to {high:+.1f})"


def _plot(rows: list[Measured], heldout: Heldout) -> Plot:
    plain = rows[0]
    curves = []
    for attention in dict.fromkeys(row.attention for row in rows):
        chosen = [row for row in rows if row.attention == attention]
        increases = [_increases(heldout, row.nats, plain.nats) for row in chosen]
        value, low, high = zip(*increases, strict=True)
        sizes = tuple(100 * row.num_bytes / plain.num_bytes for row in chosen)
        name = f"attention {attention.partition('g')[0]} bit"
        curves.append(Curve(f"ours, {name}", sizes, value, low, high))
        stock = tuple(
            100 * (heldout.perplexity(row.stock_nats) / heldout.perplexity(plain.stock_nats) - 1)
            for row in chosen
        )
        sizes = tuple(100 * row.stock_bytes / plain.stock_bytes for row in chosen)
        curves.append(Curve(f"hqq, {name}", sizes, stock, dashed=True))
    base = _PAPER[16, 16]
    for index, text in ((1, "Wiki2"), (2, "C4")):
        points = [values for (attention, _), values in _PAPER.items() if attention == 4]
        sizes = tuple(100 * point[0] / base[0] for point in points)
        over = tuple(100 * (float(point[index] or math.nan) / base[index] - 1) for point in points)
        curves.append(
            Curve(f"the paper's Mixtral-8x7B, {text}, attention 4 bit", sizes, over, dashed=True)
        )
    return Plot(
        "quality",
        "Quality against size: experts in 16, 4, 3, 2 bits from right to left",
        "size, % of 16 bits",
        "perplexity, % over 16 bits",
        tuple(curves),
    )
