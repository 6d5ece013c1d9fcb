"""Protobuf messages as plain values."""

from typing import Any

from google.protobuf.message import Message


def to_plain(message: Message) -> dict[str, Any]:
    """All fields of ``message`` under their proto names; integers stay integers.

    ``google.protobuf.json_format`` would make strings of 64-bit ones.
    """
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None:
            value = [to_plain(each) for each in value] if field.is_repeated else to_plain(value)
        elif field.is_repeated:
            value = list(value)
        plain[field.name] = value
    return plain
