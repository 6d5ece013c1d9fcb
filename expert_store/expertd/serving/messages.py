"""What the daemon knows of a model, as protobuf messages."""

from expertd.hosting.hosted_model import HostedModel, ModelState
from expertd.tables.hosted_table import HostedTable
from expertstore.pack.manifest import Encoding, RecordLayout
from expertstore.v1 import expert_store_pb2 as pb

_STATES = {
    ModelState.SERVING: pb.MODEL_STATE_SERVING,
    ModelState.UNLOADING: pb.MODEL_STATE_UNLOADING,
}
_ENCODINGS = {
    Encoding.PLAIN: pb.ENCODING_PLAIN,
    Encoding.HQQ: pb.ENCODING_HQQ,
    Encoding.INT: pb.ENCODING_INT,
    Encoding.MXFP4: pb.ENCODING_MXFP4,
    Encoding.NVFP4: pb.ENCODING_NVFP4,
    Encoding.FP8: pb.ENCODING_FP8,
    Encoding.MXFP8: pb.ENCODING_MXFP8,
}


def model_summary(model: HostedModel) -> pb.ModelSummary:
    """A model in a line."""
    return pb.ModelSummary(
        name=model.name,
        architecture=model.manifest.architecture,
        scheme=model.manifest.scheme,
        num_experts=model.num_entries,
        num_resident=model.num_resident,
        record_bytes=model.max_record_bytes,
        expert_bytes=model.manifest.expert_bytes,
        pack_path=str(model.path),
        state=_STATES[model.state],
        min_bytes=model.limits.min_bytes,
        max_bytes=model.limits.max_bytes or 0,
        num_pinned=len(model.pins),
    )


def model_response(
    model: HostedModel, max_fetch_records: int, incarnation: str
) -> pb.GetModelResponse:
    """All that a worker needs to find and read the model's records."""
    return pb.GetModelResponse(
        summary=model_summary(model),
        layers=[
            pb.MoeLayer(
                layer=layer.layer,
                num_experts=layer.num_experts,
                experts_per_token=layer.experts_per_token,
                layout=layer.layout,
                first_entry=model.first_entry(layer.layer),
            )
            for layer in model.manifest.layers
        ],
        layouts=[_layout(layout) for layout in model.manifest.layouts],
        tables=[_table(table) for table in model.tables],
        fingerprint=model.fingerprint,
        max_fetch_records=max_fetch_records,
        incarnation=incarnation,
    )


def _table(hosted: HostedTable) -> pb.Table:
    places = hosted.slots.places
    return pb.Table(
        name=hosted.table.name,
        num_rows=hosted.table.num_rows,
        row_bytes=hosted.table.row_bytes,
        max_rows=hosted.max_rows,
        cache_offset=places.offset,
        cache_sets=places.num_sets,
    )


def pack_place(model: HostedModel, entry: int) -> pb.PackPlace:
    """Where a worker finds an entry's record by itself."""
    layer, expert = model.expert(entry)
    place = model.place(entry)
    return pb.PackPlace(
        expert=pb.ExpertRef(layer=layer, expert=expert),
        file=place.file.path.name,
        offset=place.offset,
        checksum=int(place.checksum, 16),
    )


def _layout(layout: RecordLayout) -> pb.RecordLayout:
    return pb.RecordLayout(
        record_bytes=layout.record_bytes,
        parts=[
            pb.Part(
                name=part.name,
                offset=part.offset,
                num_bytes=part.num_bytes,
                shape=part.shape,
                dtype=part.dtype,
            )
            for part in layout.parts
        ],
        matrices=[
            pb.MatrixEncoding(
                name=matrix.name,
                encoding=_ENCODINGS[matrix.encoding],
                out_features=matrix.out_features,
                in_features=matrix.in_features,
                bits=matrix.bits,
                group_size=matrix.group_size,
                meta_group_size=matrix.meta_group_size,
                group_rows=matrix.group_rows,
            )
            for matrix in layout.matrices
        ],
    )
