"""transformers' look through its models is quicker, and sees the same."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils import import_utils

from expertd_inference.process.models_scan import quicken

MODELS = Path(import_utils.__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def quick() -> SimpleNamespace:
    scanner = SimpleNamespace(
        create_import_structure_from_path=import_utils.create_import_structure_from_path,
        fetch__all__=import_utils.fetch__all__,
    )
    quicken(scanner)
    return scanner


def test_same_names_of_every_file(quick: SimpleNamespace) -> None:
    seen = 0
    for file in MODELS.glob("*/*.py"):
        content = file.read_text()
        names = import_utils.fetch__all__(content)
        assert quick.fetch__all__(content) == names, file
        seen += bool(names)
    assert seen > 500


@pytest.mark.parametrize(
    "content",
    [
        "",
        "__all__",
        '__all__ = ["A"]',
        '__all__ = ["A"]\nclass A: ...\n__all__ = ["B", "C"]\n',  # the last counts
        'x = 1\n\n__all__ = [\n    "A",\n    "B",\n]\n',
        'def f():\n    "says __all__, and has none"\n',
        'x = 1\n  __all__ = ["no line begins with it"]',
    ],
)
def test_same_names_of_odd_files(quick: SimpleNamespace, content: str) -> None:
    def names(of: object) -> object:
        try:
            return of(content)  # type: ignore[operator]
        except (IndexError, ValueError) as error:
            return type(error)

    assert names(quick.fetch__all__) == names(import_utils.fetch__all__)


def test_scanner_that_has_other_functions() -> None:
    other = SimpleNamespace(create_import_structure_from_path=print)
    quicken(other)
    assert other == SimpleNamespace(create_import_structure_from_path=print)


def test_transformers_has_what_is_quickened() -> None:
    """And each folder is looked at once, by what a worker's process sets before it imports it."""
    script = """
import sys
from expertd_inference import prepare_environment
prepare_environment(device="cpu")
from transformers import MixtralConfig
from transformers.utils import import_utils
found = import_utils.create_import_structure_from_path.cache_info()
assert found.misses < 1.2 * found.currsize, found
assert found.hits > 0.8 * found.currsize, found
assert import_utils.fetch__all__.__wrapped__
assert MixtralConfig().model_type == "mixtral"
assert not any("models_scan" in type(finder).__module__ for finder in sys.meta_path)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
