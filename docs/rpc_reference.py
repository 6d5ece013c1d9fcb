"""docs/rpc.md, made of the comments in the .proto: `make proto`."""

import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

# Where each kind stands in a path of the source information, by descriptor.proto.
_MESSAGE, _ENUM, _SERVICE, _OF_MESSAGE, _OF_OTHERS = 4, 5, 6, 2, 2
_SYNTAX = (12,)

_HEAD = """\
# RPC reference

<!-- Made by `make proto` of {proto}. Do not edit. -->

The gRPC interface of the daemon, for clients in other languages and for reading traces; Python
has [a client](client.md). Beside it the daemon serves `grpc.health.v1` and reflection.

"""


def render(proto: Path) -> str:
    """The page for one .proto file, as Markdown."""
    file = _described(proto)
    comments = _comments(file)
    blocks = [_HEAD.format(proto=proto.name) + _prose(comments.get(_SYNTAX, ""))]
    for number, service in enumerate(file.service):
        blocks.append(f"## {service.name}")
        blocks.append(_prose(comments.get((_SERVICE, number), "")))
        rows = []
        for index, method in enumerate(service.method):
            asked, given = (_link(name) for name in (method.input_type, method.output_type))
            stream = "stream of " if method.server_streaming else ""
            text = _cell(comments.get((_SERVICE, number, _OF_OTHERS, index), ""))
            rows.append((f"`{method.name}`", asked, stream + given, text))
        blocks.append(_table(("call", "takes", "gives", ""), rows))
    blocks.append("## Messages")
    for number, message in enumerate(file.message_type):
        blocks.append(f"### {message.name}")
        blocks.append(_prose(comments.get((_MESSAGE, number), "")))
        rows = [
            (
                str(field.number),
                f"`{field.name}`",
                _type(field, message),
                _cell(comments.get((_MESSAGE, number, _OF_MESSAGE, index), "")),
            )
            for index, field in enumerate(message.field)
        ]
        blocks.append(_table(("", "field", "type", ""), rows) if rows else "No fields.")
    blocks.append("## Enumerations")
    for number, enum in enumerate(file.enum_type):
        blocks.append(f"### {enum.name}")
        blocks.append(_prose(comments.get((_ENUM, number), "")))
        rows = [
            (
                str(value.number),
                f"`{value.name}`",
                _cell(comments.get((_ENUM, number, _OF_OTHERS, index), "")),
            )
            for index, value in enumerate(enum.value)
        ]
        blocks.append(_table(("", "value", ""), rows))
    return "\n\n".join(block.strip() for block in blocks if block.strip()) + "\n"


def _described(proto: Path) -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        arguments = [f"-I{proto.parent}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *arguments, proto.name]):
            sys.exit(f"{proto} cannot be compiled: see above.")
        (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    return file


def _comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {
        tuple(place.path): "".join([*place.leading_detached_comments, place.leading_comments])
        for place in file.source_code_info.location
    }


def _prose(comment: str) -> str:
    """As it is; indented lines, as lists of names and meanings are, in their own shape."""
    lines = [line.removeprefix(" ") for line in comment.splitlines()]
    shaped, inside = [], False
    for line in lines:
        if line.startswith("  ") != inside:
            shaped.append("```" if inside else "\n```text")
            inside = not inside
        shaped.append(line)
    return "\n".join([*shaped, *(["```"] if inside else [])])


def _cell(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.type_name:
        name = _link(field.type_name)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    sys.stdout.write(render(Path(sys.argv[1])))
