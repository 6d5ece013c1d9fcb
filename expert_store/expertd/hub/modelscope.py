"""Repositories of ModelScope (``MODELSCOPE_ENDPOINT``), by its own library, modelscope_hub.

Its transfers resume, retry and check what came. Parts of files are asked of the address that the
library downloads from.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from huggingface_hub.utils import http_backoff
from modelscope_hub import HubApi, HubConfig
from modelscope_hub.errors import (
    AuthenticationError,
    FileIntegrityError,
    HubError,
    NotExistError,
    PermissionDeniedError,
)

from expertd.hub.huggingface import TransportError
from expertd.hub.reference import HubReference
from expertd.hub.repository import HubFile
from expertstore.errors import CheckpointError

MAIN = "master"
_MODEL = "model"


class ModelScopeRepository:
    """See :class:`expertd.hub.repository.Repository`."""

    def __init__(self, reference: HubReference) -> None:
        """Asks the hub for the list of files. Raises :class:`CheckpointError`."""
        self.reference = reference
        self._config = HubConfig()
        self._api = HubApi(self._config)
        self._revision = reference.revision or MAIN
        with self._said():
            found = self._api.list_repo_files(
                reference.name, _MODEL, revision=self._revision, recursive=True
            )
        self.files: Mapping[str, HubFile] = {
            each.path: HubFile(each.path, each.size, (each.sha256 or "").lower())
            for each in found
            if not each.is_dir
        }
        # A listing names no commit; its checksums change when a file does.
        listing = repr(
            sorted((file.name, file.num_bytes, file.sha256) for file in self.files.values())
        )
        self.commit = hashlib.sha256(listing.encode()).hexdigest()

    def cached(self, name: str) -> Path | None:
        """None: what its cache holds is not told apart by content."""
        return None

    def read(self, name: str, offset: int, count: int) -> bytes:
        """``count`` bytes of the file by a range request, or fewer at its end."""
        query = urlencode({"Revision": self._revision, "FilePath": name})
        url = f"{self._config.endpoint}/api/v1/models/{self.reference.name}/repo?{query}"
        headers = {"Range": f"bytes={offset}-{offset + count - 1}", "Accept-Encoding": "identity"}
        if self._config.token:
            headers["Authorization"] = f"Bearer {self._config.token}"
        with self._said(name):
            answer = http_backoff("GET", url, headers=headers, follow_redirects=True)
            answer.raise_for_status()
        if answer.status_code != 206:
            raise CheckpointError(
                f"{self._config.endpoint} does not send parts of files, and {self.reference} is "
                f"fetched in parts; download it with `ms download {self.reference.name}`."
            )
        return answer.content

    def download(self, name: str, folder: Path | None, on_bytes: Callable[[int], None]) -> Path:
        """Fetches the file by modelscope_hub, which checks it; its bytes count at the end."""
        file = self.files[name]
        with self._said(name):
            place = self._api.download_file(
                self.reference.name,
                _MODEL,
                name,
                revision=self._revision,
                local_dir=folder,
                expected_sha256=file.sha256 or None,
                file_size=file.num_bytes,
            )
        on_bytes(file.num_bytes)
        return Path(place)

    @contextmanager
    def _said(self, name: str = "") -> Iterator[None]:
        """Makes the hub's errors sentences."""
        what = f"{name} of {self.reference}" if name else str(self.reference)
        try:
            yield
        except NotExistError as error:
            raise CheckpointError(
                f"{self._config.endpoint} shows no {what}: look at the name and the revision; if "
                "it is private, log in with `ms login` (or set MODELSCOPE_API_TOKEN)."
            ) from error
        except (AuthenticationError, PermissionDeniedError) as error:
            raise CheckpointError(
                f"ModelScope forbids {what} to this account; log in with `ms login` (or set "
                "MODELSCOPE_API_TOKEN), and accept the model's terms on its page."
            ) from error
        except FileIntegrityError as error:
            raise CheckpointError(
                f"{what} came again and again with other bytes than the hub has: the way there "
                "changes them; try another network."
            ) from error
        except (HubError, TransportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{what} could not be fetched from {self._config.endpoint} ({reason}); the same "
                "command goes on where it was."
            ) from error
