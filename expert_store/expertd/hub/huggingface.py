"""Repositories of Hugging Face's hub, and of what speaks like it (``HF_ENDPOINT``).

All transfers are huggingface_hub's: its tokens, its cache, its retries, its resuming, its offline
mode. Here its errors become sentences, and what it fetched is checked against the hub's SHA-256.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from expertd.hub.reference import HubReference
from expertd.hub.repository import HubFile
from expertstore.errors import CheckpointError

TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
"""What its HTTP client raises: httpx's or httpx2's, as its version has it."""
NUM_ATTEMPTS = 2
"""Of a download that does not have the hub's checksum."""


class HuggingFaceRepository:
    """See :class:`expertd.hub.repository.Repository`."""

    def __init__(self, reference: HubReference) -> None:
        """Asks the hub for the list of files. Raises :class:`CheckpointError`."""
        self.reference = reference
        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        with self._said():
            info = HfApi(endpoint=self._endpoint).model_info(
                reference.name, revision=reference.revision, files_metadata=True
            )
        assert info.sha is not None, "the hub names the commit of every revision"
        self.commit = info.sha
        self.files: Mapping[str, HubFile] = {
            each.rfilename: HubFile(
                each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else ""
            )
            for each in info.siblings or ()
        }

    def cached(self, name: str) -> Path | None:
        """The file in the hub's cache, if a program has fetched it before."""
        found = try_to_load_from_cache(self.reference.name, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def read(self, name: str, offset: int, count: int) -> bytes:
        """``count`` bytes of the file by a range request, or fewer at its end."""
        url = hf_hub_url(self.reference.name, name, revision=self.commit, endpoint=self._endpoint)
        headers = build_hf_headers() | {
            "Range": f"bytes={offset}-{offset + count - 1}",
            "Accept-Encoding": "identity",
        }
        with self._said(name):
            answer = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
        if answer.status_code != 206:
            raise CheckpointError(
                f"{self._endpoint} does not send parts of files, and {self.reference} is fetched "
                f"in parts; download it with `hf download {self.reference.name}`."
            )
        return answer.content

    def download(self, name: str, folder: Path | None, on_bytes: Callable[[int], None]) -> Path:
        """Fetches the file by huggingface_hub, and checks it."""
        expected = self.files[name]
        # In the cache the branch is noted too, for those who ask it offline.
        revision = self.commit if folder else self.reference.revision
        for attempt in range(NUM_ATTEMPTS):
            with self._said(name):
                file = Path(
                    hf_hub_download(
                        self.reference.name,
                        name,
                        revision=revision,
                        local_dir=folder,
                        endpoint=self._endpoint,
                        force_download=attempt > 0,
                        tqdm_class=_telling(on_bytes),
                    )
                )
            if not expected.sha256 or _sha256(file) == expected.sha256:
                return file
            on_bytes(-expected.num_bytes)
        raise CheckpointError(
            f"{name} of {self.reference} came {NUM_ATTEMPTS} times with other bytes than the hub "
            f"has ({expected.sha256[:16]}...): the way there changes them; try another endpoint or "
            "network."
        )

    @contextmanager
    def _said(self, name: str = "") -> Iterator[None]:
        """Makes the hub's errors sentences."""
        what = f"{name} of {self.reference}" if name else str(self.reference)
        try:
            yield
        except GatedRepoError as error:
            raise CheckpointError(
                f"{self.reference} is gated: accept its terms at "
                f"{self._endpoint}/{self.reference.name}, log in with `hf auth login` (or set "
                "HF_TOKEN), and try again."
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{self.reference.name} has no revision {self.reference.revision}; give one of its "
                "branches, tags or commits."
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self._endpoint} shows no model {self.reference.name}: look at the name; if it "
                "is private, log in with `hf auth login` (or set HF_TOKEN)."
            ) from error
        except EntryNotFoundError as error:
            raise CheckpointError(_not_there(what, error)) from error
        except OfflineModeIsEnabled as error:
            raise CheckpointError(
                f"{what} is not in the cache of this host, and HF_HUB_OFFLINE forbids to ask for "
                "it; unset it, or fetch the model where there is a network."
            ) from error
        except HfHubHTTPError as error:
            raise CheckpointError(_answered(what, error)) from error
        except (TransportError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{what} could not be fetched from {self._endpoint} ({reason}); the same command "
                "goes on where it was."
            ) from error


def _not_there(what: str, error: EntryNotFoundError) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{what} is not in the cache of this host, and the hub cannot be asked: "
            "it does not answer, or HF_HUB_OFFLINE is set."
        )
    return f"{what} is not on the hub any more; give a revision that has it."


def _answered(what: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"The hub does not accept the token for {what}; log in again with `hf auth login`."
    if status == 403:
        return f"The hub forbids {what} to this account; ask its owner for access."
    if status == 429:
        return f"The hub has had too many requests for {what}; wait some minutes, or log in."
    return f"The hub answered {status} for {what}; the same command goes on where it was, later."


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _telling(on_bytes: Callable[[int], None]) -> type[Any]:
    """What huggingface_hub takes for a progress bar of tqdm; it tells how many bytes came."""

    class Bar:
        n = 0.0
        total: float | None = None
        format_dict: Mapping[str, Any] = {}

        def __init__(self, *, initial: float = 0, **_: object) -> None:
            self.update(initial)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            self.n += count or 0
            on_bytes(int(count or 0))

        def update_transfer(self, count: float) -> None:
            """Bytes on the wire; without it huggingface_hub makes a second bar for these."""

        def set_postfix_str(self, *_: object, **__: object) -> None:
            pass

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            pass

    return Bar
