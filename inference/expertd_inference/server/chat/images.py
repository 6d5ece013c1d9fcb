"""The images of a chat's messages: from URLs of data or files, checked before an engine sees them.

Web addresses are not fetched: who may ask this server could make it ask others.
"""

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from expertd_inference.images import MAX_BYTES, check_images
from expertd_inference.server.api.errors import ApiError, wrong_value
from expertstore.errors import InvalidInputError
from expertstore.sizes import format_bytes

IMAGE_PARTS = {"image_url", "input_image", "image"}
"""Names for a part of a content that is an image: OpenAI's in chats and responses, Anthropic's."""
WHERE = "expertd_where"
"""A field of such a part that says where it stood in a request of another form."""
_BASE64 = "data:image;base64,"
_DATA = re.compile(r"data:(?P<kind>[^;,]*)(?:;[^;,]*)*;base64,")


class Images:
    """Those of one request, in the order of its messages."""

    def __init__(self, folder: Path | None, why_not: str = "") -> None:
        """``folder`` is where files may be, none by default; ``why_not``, why none are taken."""
        self._folder = folder
        self._why_not = why_not
        self._named: list[tuple[str, bytes]] = []

    @property
    def data(self) -> tuple[bytes, ...]:
        """Their files."""
        return tuple(data for _, data in self._named)

    def take(self, where: str, part: dict[str, Any]) -> None:
        """One more: ``part`` of a content, which is at ``where``. Raises ApiError."""
        where = str(part.get(WHERE, where))
        if self._why_not:
            raise ApiError(
                400,
                f"{where} is an image, and {self._why_not}; send text, or ask a model that sees.",
                code="unsupported_content",
                param=where,
            )
        where, url = _address(where, part)
        self._named.append((where, self._read(where, url)))

    def check(self) -> None:
        """Raises ApiError for one that cannot be looked at, or if there are too many."""
        try:
            check_images(self._named)
        except InvalidInputError as error:
            param = str(error).partition(" ")[0]
            raise ApiError(400, str(error), code="invalid_image", param=param) from error

    def _read(self, where: str, url: str) -> bytes:
        if found := _DATA.match(url):
            try:
                return base64.b64decode(url[found.end() :], validate=True)
            except (binascii.Error, ValueError) as error:
                raise _refused(where, f"is no base64 ({error}); send the file so") from error
        if url.startswith("data:"):
            raise _refused(where, "is not in base64; send data:image/png;base64,...")
        if url.startswith("file:"):
            return self._file(where, url)
        if url.startswith(("http:", "https:")):
            raise _refused(
                where, "is a web address, which this server does not fetch; send a data: URL"
            )
        raise _refused(where, "is neither a data: nor a file: URL; send data:image/png;base64,...")

    def _file(self, where: str, url: str) -> bytes:
        if self._folder is None:
            raise _refused(
                where, "is a file, which this server reads if started with --images DIR; send a "
                "data: URL"
            )  # fmt: skip
        outside = f"is not in {self._folder} (--images); name a file there"
        parts = urlsplit(url)
        path = unquote(parts.path)
        if parts.netloc not in ("", "localhost") or "\0" in path:
            raise _refused(where, outside)
        # Links are followed first: what they lead to has to be there, too.
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(self._folder)):
            raise _refused(where, outside)
        try:
            if not real.is_file():
                raise _refused(where, "names no file")
            if (size := real.stat().st_size) > MAX_BYTES:
                raise _refused(
                    where, f"has {format_bytes(size)}, and an image may have "
                    f"{format_bytes(MAX_BYTES)}"
                )  # fmt: skip
            return real.read_bytes()
        except OSError as error:
            raise _refused(where, f"cannot be read: {error.strerror}") from error


def _address(where: str, part: dict[str, Any]) -> tuple[str, str]:
    """Where the URL of an image stands, and the URL; what is base64 alone is made one."""
    if isinstance(source := part.get("source"), dict):  # Anthropic's
        if source.get("type") == "base64":
            return f"{where}.source.data", f"{_BASE64}{_text(f'{where}.source', source, 'data')}"
        return f"{where}.source.url", _text(f"{where}.source", source, "url")
    if "base64" in part:  # Ollama's
        return where, f"{_BASE64}{_text(where, part, 'base64')}"
    if part.get("file_id"):
        raise _refused(f"{where}.file_id", "is not supported; send the image as a data: URL")
    if isinstance(inner := part.get("image_url"), dict):
        return f"{where}.image_url.url", _text(f"{where}.image_url", inner, "url")
    return f"{where}.image_url", _text(where, part, "image_url")


def _text(where: str, part: dict[str, Any], name: str) -> str:
    value = part.get(name)
    if not isinstance(value, str):
        raise wrong_value(f"{where}.{name}", value, "an image, in base64")
    return value


def _refused(where: str, why: str) -> ApiError:
    return ApiError(400, f"{where} {why}.", code="invalid_image", param=where)
