"""Requests for every RPC, drawn from the protobuf descriptors, sound and unsound."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from expertstore.v1 import expert_store_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ExpertStore"]
METHODS: Mapping[str, MethodDescriptor] = SERVICE.methods_by_name

_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
}
_MAX_ITEMS = 30


@dataclass(frozen=True)
class Request:
    """One call: which, with what bytes, as whom, for how long."""

    method: str
    data: bytes
    who: str
    seconds: float
    messages: int
    """How many answers of a stream are read before it is cancelled."""


def requests(
    hints: Mapping[str, st.SearchStrategy[Any]],
    who: Callable[[str], st.SearchStrategy[str]],
) -> Any:
    """A call of any method; ``hints`` are likely values by field name, ``who`` by method."""
    return st.sampled_from(sorted(METHODS)).flatmap(
        lambda name: st.builds(
            Request,
            method=st.just(name),
            data=_encoded(METHODS[name].input_type, hints),
            who=who(name),
            seconds=st.sampled_from([0.002, 0.05, 2.0, 2.0, 2.0]),
            messages=st.integers(0, 3),
        )
    )


def _encoded(kind: Descriptor, hints: Mapping[str, st.SearchStrategy[Any]]) -> Any:
    sound = _messages(kind, hints).map(lambda message: message.SerializeToString())
    return st.one_of(
        sound,
        sound,
        sound.flatmap(_bent),
        # Fields that no version of ours has, and groups, which proto3 has not.
        sound.flatmap(lambda data: st.binary(max_size=12).map(lambda tail: data + tail)),
        sound.map(lambda data: data + b"\xc2\x3e\x04abcd"),
        st.binary(max_size=200),
        # A string or a message that ends beyond the end, or is no UTF-8.
        st.sampled_from(
            [b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x12\x03\xed\xa0\x80"]
        ),
        # Nested without end.
        st.integers(1, 400).map(lambda depth: b"\x0b" * depth),
    )


@st.composite
def _bent(draw: st.DrawFn, data: bytes) -> bytes:
    bent = bytearray(data)
    for _ in range(draw(st.integers(1, 4)) if bent else 0):
        bent[draw(st.integers(0, len(bent) - 1))] = draw(st.integers(0, 255))
    return bytes(bent[: draw(st.integers(0, len(bent)))])


@st.composite
def _messages(draw: st.DrawFn, kind: Descriptor, hints: Mapping[str, Any]) -> Any:
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if draw(st.integers(0, 4)) == 0:
            continue
        value = _values(field, hints)
        if not field.is_repeated:
            drawn = draw(value)
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                getattr(message, field.name).CopyFrom(drawn)
            else:
                setattr(message, field.name, drawn)
        else:
            items = draw(st.lists(value, max_size=draw(st.sampled_from([1, 3, _MAX_ITEMS]))))
            getattr(message, field.name).extend(items)
    return message


def _values(field: FieldDescriptor, hints: Mapping[str, Any]) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        assert field.message_type is not None
        return _messages(field.message_type, hints)
    if field.type in _RANGES:
        values: Any = st.integers(*_RANGES[field.type])
    elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        values = st.floats()
    elif field.type == FieldDescriptor.TYPE_BOOL:
        values = st.booleans()
    elif field.type == FieldDescriptor.TYPE_ENUM:
        values = st.integers(-1, 5)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        values = st.binary(max_size=50)
    else:
        values = st.text(max_size=50)
    hint = hints.get(field.name)
    return values if hint is None else st.one_of(hint, hint, hint, values)
