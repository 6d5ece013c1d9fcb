"""A file of requests in OpenAI's batch format: one JSON object a line."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expertstore.errors import InvalidInputError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""What a line may ask."""
MAX_ID_LENGTH = 512


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One line."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class _Named(msgspec.Struct):
    custom_id: str


@dataclass(frozen=True)
class _Place:
    """Where a line stands in its file, in bytes, and its number, from 1 on."""

    offset: int
    size: int
    number: int


class BatchFile:
    """The requests of a file, by their ``custom_id``; a line is read again when it is asked."""

    def __init__(
        self, path: Path, name: str | None = None, endpoints: Sequence[str] = ENDPOINTS
    ) -> None:
        """``name`` is what messages call the file; its lines may ask ``endpoints``.

        Raises InvalidInputError, with the line, for a file that cannot be answered line by line:
        one without lines, or with a line that is no JSON object, or whose custom_id is missing or
        another line's.
        """
        self._name = name or str(path)
        self._endpoints = endpoints
        self._places: dict[str, _Place] = {}
        try:
            self._file = path.open("rb")
            try:
                self._read()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise InvalidInputError(f"{self._name} cannot be read: {error.strerror}.") from error
        if not self._places:
            self._file.close()
            raise InvalidInputError(
                f"{self._name} has no request; give one JSON object a line, with custom_id, "
                "method, url and body."
            )

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> "BatchFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def custom_ids(self) -> list[str]:
        """Of all requests, in the order of their lines."""
        return [*self._places]

    def request(self, custom_id: str) -> BatchRequest:
        """Raises InvalidInputError for a line that asks for something that a batch cannot have."""
        place = self._places[custom_id]
        self._file.seek(place.offset)
        try:
            request = msgspec.json.decode(self._file.read(place.size), type=BatchRequest)
        except msgspec.ValidationError as error:
            raise self._wrong(place.number, str(error)) from error
        except RecursionError as error:
            raise self._wrong(place.number, "it is nested too deep") from error
        if request.method != "POST":
            raise self._wrong(place.number, f"method is {request.method!r:.80}; give POST")
        if request.url not in self._endpoints:
            known = " or ".join(self._endpoints)
            raise self._wrong(place.number, f"url is {request.url!r:.80}; give {known}")
        if request.body.get("stream"):
            raise self._wrong(place.number, "body.stream is set, and a batch's answers come whole")
        return request

    def close(self) -> None:
        """Reads no more. Closing twice is harmless."""
        self._file.close()

    def _read(self) -> None:
        offset = 0
        for number, line in enumerate(self._file, start=1):
            start = len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
            if line.strip():
                custom_id = self._custom_id(number, line[start:])
                if (earlier := self._places.get(custom_id)) is not None:
                    raise self._wrong(
                        number, f"custom_id {custom_id!r:.80} is line {earlier.number}'s already"
                    )
                self._places[custom_id] = _Place(offset + start, len(line) - start, number)
            offset += len(line)

    def _custom_id(self, number: int, line: bytes) -> str:
        try:
            custom_id = msgspec.json.decode(line, type=_Named).custom_id
        except msgspec.ValidationError as error:
            raise self._wrong(number, str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = f"it is no JSON ({error}); give one JSON object a line"
            raise self._wrong(number, reason) from error
        except RecursionError as error:
            raise self._wrong(number, "it is nested too deep; send flatter JSON") from error
        if not 1 <= len(custom_id) <= MAX_ID_LENGTH:
            raise self._wrong(
                number,
                f"custom_id has {len(custom_id)} characters; give 1 to {MAX_ID_LENGTH}",
            )
        return custom_id

    def _wrong(self, number: int, why: str) -> InvalidInputError:
        return InvalidInputError(f"{self._name}, line {number}: {why}.")
