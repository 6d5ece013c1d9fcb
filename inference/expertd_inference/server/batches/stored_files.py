"""Files of clients on disk: what ``/v1/files`` shows."""

import secrets
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from expertstore.errors import BusyError, PreconditionError

MAX_FILES = 10_000
MAX_BYTES = 8 << 30
"""Of all files together; answers of batches may go beyond."""
_ABOUT = ".json"
StructT = TypeVar("StructT", bound=msgspec.Struct)


class FileObject(msgspec.Struct, kw_only=True):
    """A file as OpenAI describes it."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"


class _Kept(msgspec.Struct):
    """What stands beside a file's content."""

    owner: str
    file: FileObject


class StoredFiles:
    """Files in a directory, each with its owner, whom alone it is shown to.

    A content without a description is one that was not complete when its writer was killed, and
    is removed.
    """

    def __init__(self, directory: Path) -> None:
        """Raises PreconditionError if the directory cannot be used."""
        self._directory = directory
        self._kept: dict[str, _Kept] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f"*{_ABOUT}"):
            kept = read_struct(path, _Kept)
            self._kept[kept.file.id] = kept
        for path in directory.iterdir():
            if path.name.removesuffix(_ABOUT) not in self._kept:
                path.unlink()

    @property
    def num_bytes(self) -> int:
        """Of all contents."""
        return sum(kept.file.bytes for kept in self._kept.values())

    def owned_by(self, owner: str) -> list[FileObject]:
        """From the oldest to the newest."""
        files = [kept.file for kept in self._kept.values() if kept.owner == owner]
        return sorted(files, key=lambda file: (file.created_at, file.id))

    def find(self, owner: str, id_: str) -> FileObject | None:
        """None if the owner has no such file."""
        kept = self._kept.get(id_)
        return kept.file if kept is not None and kept.owner == owner else None

    def path(self, id_: str) -> Path:
        """Of a file's content."""
        return self._directory / id_

    def new_path(self) -> Path:
        """Where a content can be written that :meth:`adopt` takes."""
        return self._directory / f"file-{secrets.token_hex(16)}"

    def check_room(self, num_bytes: int) -> None:
        """Raises BusyError if there is no room for another file of this size."""
        if len(self._kept) >= MAX_FILES or self.num_bytes + num_bytes > MAX_BYTES:
            raise BusyError(
                f"The server keeps {len(self._kept)} files of {self.num_bytes} bytes and has no "
                "room for another one; delete files."
            )

    def adopt(self, owner: str, path: Path, filename: str, purpose: str) -> FileObject:
        """The file whose content is at ``path``, a name of :meth:`new_path`, from now on."""
        file = FileObject(
            id=path.name,
            bytes=path.stat().st_size,
            created_at=int(time.time()),
            filename=filename,
            purpose=purpose,
        )
        kept = _Kept(owner, file)
        write_struct(path.with_name(path.name + _ABOUT), kept)
        self._kept[file.id] = kept
        return file

    def delete(self, id_: str) -> None:
        """The description first, so that nothing is described that is not there."""
        del self._kept[id_]
        path = self.path(id_)
        path.with_name(path.name + _ABOUT).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def read_struct(path: Path, kind: type[StructT]) -> StructT:
    """What :func:`write_struct` wrote. Raises PreconditionError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise PreconditionError(f"{path} cannot be used: {error}.") from error


def write_struct(path: Path, value: msgspec.Struct) -> None:
    """As JSON: whole, or as it was before."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)
