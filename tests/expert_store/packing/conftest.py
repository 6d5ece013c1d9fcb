from collections.abc import Callable
from pathlib import Path

import pytest

from expertd_testing.tiny_models import make_checkpoint

MakeCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """The tiny checkpoint of an architecture, made once; to be left as it is."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_checkpoint(
                architecture, tmp_path_factory.mktemp("checkpoints") / architecture
            )
        return made[architecture]

    return make
