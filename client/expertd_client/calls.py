"""Every RPC as a value: the method's name, its request, and what to make of the answer.

The sync and the asyncio client send the same calls, each in its own way.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import Message

from expertd_client.annex import PackPlace
from expertd_client.model import ModelInfo, ModelState, ModelSummary, MoeLayer, TableInfo
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.pack.files import check_path
from expertstore.pack.manifest import Encoding, Matrix, Part, RecordLayout
from expertstore.plain import to_plain
from expertstore.shared.row_cache import RowPlaces
from expertstore.v1 import expert_store_pb2 as pb

ResultT = TypeVar("ResultT")

MAX_LAYER_OR_EXPERT = (1 << 32) - 1
_ENCODINGS = {
    pb.ENCODING_PLAIN: Encoding.PLAIN,
    pb.ENCODING_HQQ: Encoding.HQQ,
    pb.ENCODING_INT: Encoding.INT,
    pb.ENCODING_MXFP4: Encoding.MXFP4,
    pb.ENCODING_NVFP4: Encoding.NVFP4,
    pb.ENCODING_FP8: Encoding.FP8,
    pb.ENCODING_MXFP8: Encoding.MXFP8,
}


class Call(NamedTuple, Generic[ResultT]):
    """One RPC. ``decode`` makes of a response, or of each of a stream's, what callers get."""

    method: str
    request: Message
    decode: Callable[..., ResultT]


def list_models() -> Call[list[ModelSummary]]:
    """All models."""
    return Call(
        "ListModels",
        pb.ListModelsRequest(),
        lambda response: [_summary(model) for model in response.models],
    )


def get_model(name: str) -> Call[ModelInfo]:
    """One model's layers and layouts."""
    return Call("GetModel", pb.GetModelRequest(name=name), _model_info)


def load_model(
    name: str,
    pack_path: Path,
    *,
    min_bytes: int = 0,
    max_bytes: int | None = None,
    pins: Sequence[str] = (),
    disk_io: str | None = None,
) -> Call[ModelSummary]:
    """Opens a pack under ``name``. Raises PackError if the path cannot be told."""
    check_path(pack_path)
    request = pb.LoadModelRequest(
        name=name,
        pack_path=str(pack_path.absolute()),
        min_bytes=min_bytes,
        max_bytes=max_bytes or 0,
        pins=pins,
        disk_io=disk_io or "",
    )
    return Call("LoadModel", request, lambda response: _summary(response.summary))


def set_limits(name: str, min_bytes: int | None, max_bytes: int | None) -> Call[ModelSummary]:
    """Changes how much RAM a model keeps and may take."""
    return Call(
        "SetLimits",
        pb.SetLimitsRequest(name=name, min_bytes=min_bytes, max_bytes=max_bytes),
        lambda response: _summary(response.summary),
    )


def unload_model(name: str) -> Call[int]:
    """Drops a model; the bytes that this frees."""
    return Call(
        "UnloadModel",
        pb.UnloadModelRequest(name=name),
        lambda response: int(response.released_bytes),
    )


def fetch(
    layer: int,
    experts: Iterable[int],
    number: int,
    max_in_pack: int = 0,
    *,
    in_waves: bool = False,
) -> Call[list[PackPlace]]:
    """Makes experts of one layer resident; or where in the pack they are, up to that many."""
    refs = [pb.ExpertRef(layer=layer, expert=expert) for expert in experts]
    return Call(
        "Fetch",
        pb.FetchRequest(
            experts=refs, fetch_number=number, max_in_pack=max_in_pack, in_waves=in_waves
        ),
        lambda response: [
            PackPlace(place.expert.expert, place.file, place.offset, place.checksum)
            for place in response.in_pack
        ],
    )


def prefetch(experts: Iterable[tuple[int, int]], priority: int) -> Call[int]:
    """Hints; how many reads it caused."""
    try:
        request = pb.PrefetchRequest(experts=_refs(experts), priority=priority)
    except ValueError:
        raise InvalidInputError(f"A priority is a 32-bit integer; {priority} is none.") from None
    return Call("Prefetch", request, lambda response: int(response.num_accepted))


def pin(experts: Iterable[tuple[int, int]]) -> Call[int]:
    """Keeps experts resident; how many now are because of it."""
    return Call(
        "Pin", pb.PinRequest(experts=_refs(experts)), lambda response: int(response.num_pinned)
    )


def unpin(experts: Iterable[tuple[int, int]]) -> Call[int]:
    """Undoes :func:`pin`; how many it undid. No experts: all."""
    return Call(
        "Unpin",
        pb.UnpinRequest(experts=_refs(experts)),
        lambda response: int(response.num_unpinned),
    )


def read(
    model: str, experts: Iterable[tuple[int, int]], fingerprint: str = ""
) -> Call[pb.ReadResponse]:
    """Streams records in chunks, if given only of the pack with that fingerprint."""
    request = pb.ReadRequest(model=model, experts=_refs(experts), fingerprint=fingerprint)
    return Call("Read", request, lambda response: response)


def fetch_rows(table: int, rows: bytes, used: bytes, model: str) -> Call[bytes]:
    """Rows of a table, one behind the other; numbers are 8 bytes each."""
    request = pb.FetchRowsRequest(table=table, rows=rows, used=used, model=model)
    return Call("FetchRows", request, lambda response: bytes(response.data))


def prefetch_rows(table: int, rows: bytes, used: bytes) -> Call[int]:
    """Hints; how many rows will be read."""
    request = pb.PrefetchRowsRequest(table=table, rows=rows, used=used)
    return Call("PrefetchRows", request, lambda response: int(response.num_accepted))


def get_stats() -> Call[dict[str, Any]]:
    """The daemon's stats."""
    return Call("GetStats", pb.GetStatsRequest(), lambda response: to_plain(response.stats))


def watch_stats(interval_seconds: float) -> Call[dict[str, Any]]:
    """The daemon's stats, again and again."""
    return Call(
        "WatchStats",
        pb.WatchStatsRequest(interval_seconds=interval_seconds),
        lambda response: to_plain(response.stats),
    )


def get_heat(model: str) -> Call[pb.GetHeatResponse]:
    """How hot each expert of a model is."""
    return Call("GetHeat", pb.GetHeatRequest(model=model), lambda response: response)


def watch_touches(model: str) -> Call[pb.WatchTouchesResponse]:
    """What the sessions of a model use, as it happens."""
    return Call("WatchTouches", pb.WatchTouchesRequest(model=model), lambda response: response)


def _refs(experts: Iterable[tuple[int, int]]) -> list[pb.ExpertRef]:
    try:
        return [pb.ExpertRef(layer=layer, expert=expert) for layer, expert in experts]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"Experts are given as (layer, expert) pairs of numbers from 0 to "
            f"{MAX_LAYER_OR_EXPERT}: {error}."
        ) from None


def _summary(summary: pb.ModelSummary) -> ModelSummary:
    unloading = summary.state == pb.MODEL_STATE_UNLOADING
    return ModelSummary(
        name=summary.name,
        architecture=summary.architecture,
        scheme=summary.scheme,
        num_experts=summary.num_experts,
        num_resident=summary.num_resident,
        record_bytes=summary.record_bytes,
        expert_bytes=summary.expert_bytes,
        pack_path=Path(summary.pack_path),
        state=ModelState.UNLOADING if unloading else ModelState.SERVING,
        min_bytes=summary.min_bytes,
        max_bytes=summary.max_bytes,
        num_pinned=summary.num_pinned,
    )


def _model_info(response: pb.GetModelResponse) -> ModelInfo:
    layouts = tuple(_layout(layout) for layout in response.layouts)
    layers = {
        layer.layer: MoeLayer(
            layer=layer.layer,
            num_experts=layer.num_experts,
            experts_per_token=layer.experts_per_token,
            layout=layouts[layer.layout],
            first_entry=layer.first_entry,
        )
        for layer in response.layers
    }
    summary = response.summary
    return ModelInfo(
        name=summary.name,
        architecture=summary.architecture,
        scheme=summary.scheme,
        pack_path=Path(summary.pack_path),
        fingerprint=response.fingerprint,
        layers=layers,
        layouts=layouts,
        max_fetch_records=response.max_fetch_records,
        num_experts=summary.num_experts,
        record_bytes=summary.record_bytes,
        expert_bytes=summary.expert_bytes,
        incarnation=response.incarnation,
        tables=tuple(
            TableInfo(
                name=table.name,
                num_rows=table.num_rows,
                row_bytes=table.row_bytes,
                max_rows=table.max_rows,
                places=RowPlaces(table.cache_offset, table.cache_sets, table.row_bytes),
            )
            for table in response.tables
        ),
    )


def _layout(layout: pb.RecordLayout) -> RecordLayout:
    return RecordLayout(
        record_bytes=layout.record_bytes,
        parts=tuple(
            Part(
                name=part.name,
                offset=part.offset,
                num_bytes=part.num_bytes,
                shape=tuple(part.shape),
                dtype=part.dtype,
            )
            for part in layout.parts
        ),
        matrices=tuple(
            Matrix(
                name=matrix.name,
                encoding=_encoding(matrix),
                out_features=matrix.out_features,
                in_features=matrix.in_features,
                bits=matrix.bits,
                group_size=matrix.group_size,
                meta_group_size=matrix.meta_group_size,
                group_rows=max(1, matrix.group_rows),  # daemons before NVFP4 and FP8 say none
            )
            for matrix in layout.matrices
        ),
    )


def _encoding(matrix: pb.MatrixEncoding) -> Encoding:
    try:
        return _ENCODINGS[matrix.encoding]
    except KeyError:
        raise PreconditionError(
            f"The daemon's {matrix.name} is written in a form that this client does not know "
            f"(number {matrix.encoding}); use a client of the daemon's version."
        ) from None
