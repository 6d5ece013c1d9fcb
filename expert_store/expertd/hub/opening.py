"""The repository that a user named, on the hub that it is on."""

import logging
import os
from pathlib import Path

from expertd.hub.reference import MODELSCOPE, HubReference
from expertd.hub.repository import Repository
from expertstore.errors import CheckpointError, PreconditionError


def open_repository(reference: HubReference) -> Repository:
    """Asks the hub. Raises CheckpointError, and PreconditionError without the hub's library.

    From now on the libraries' own bars and lines are not shown: what they try again is of no
    concern if it succeeds, and an error if it does not.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # which tqdm reads when it is imported
    for library in ("huggingface_hub", "modelscope_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if reference.hub == MODELSCOPE:
        try:
            from expertd.hub.modelscope import ModelScopeRepository
        except ModuleNotFoundError as error:
            raise PreconditionError(
                f"{reference} is on ModelScope, and {error.name} is not installed: "
                "`pip install 'expertd[modelscope]'`."
            ) from error
        return ModelScopeRepository(reference)
    from expertd.hub.huggingface import HuggingFaceRepository

    return HuggingFaceRepository(reference)


def cached_snapshot(reference: HubReference) -> Path | None:
    """The directory of the checkpoint in the cache, where HF_HUB_OFFLINE forbids to ask the hub.

    None where it does not. Raises CheckpointError if the cache does not have the model; what a
    directory lacks is for others to see.
    """
    if reference.hub == MODELSCOPE:
        return None
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not constants.is_offline_mode():
        return None
    try:
        return Path(
            snapshot_download(reference.name, revision=reference.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{reference} is not in the cache of this host, and HF_HUB_OFFLINE forbids to fetch "
            "it; unset that, or fetch the model where there is a network."
        ) from error
