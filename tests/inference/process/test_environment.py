"""What a worker's process imports, and how."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from expertd_inference.process.environment import UNUSED_ON_CPU, UNUSED_PACKAGES, garbage_kept
from expertd_testing.daemon import serving

Make = Callable[..., Any]

HEAVY = {
    "accelerate",
    "hqq",
    *UNUSED_PACKAGES,
    *UNUSED_ON_CPU,
    # What hqq and accelerate bring with them.
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "torch.utils.tensorboard",
    "networkx",
    "matplotlib",
    # Another model's.
    "transformers.models.gpt_oss.modeling_gpt_oss",
}
WORKER = """
import json, sys
from expertd_inference.cli.commands import app
app(sys.argv[1:], standalone_mode=False)
loaded = [name for name, module in sys.modules.items() if module is not None]
print(json.dumps(loaded), file=sys.stderr)
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_worker_imports_nothing_that_it_does_not_use(packed: Make) -> None:
    with serving({"m": packed("example", "4bit")}) as daemon:
        done = python(
            WORKER, "generate", "--socket", str(daemon.socket), "-p", "x", "--max-new-tokens", "4"
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    loaded = set(json.loads(done.stderr))
    assert loaded >= {"torch", "transformers", "transformers.models.mixtral.modeling_mixtral"}
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", [True, True]),  # of the process of somebody else nothing is taken away
        ("device='cpu'", [False, False]),
        ("device='cuda'", [False, True]),  # transformers spreads models by accelerate
    ],
)
def test_what_is_as_if_not_installed(arguments: str, expected: list[bool]) -> None:
    script = f"""
from importlib.util import find_spec
from expertd_inference import prepare_environment
prepare_environment({arguments})
print([find_spec(name) is not None for name in ("hqq", "accelerate")])
"""
    done = python(script)
    assert (done.stdout.strip(), done.stderr) == (str(expected), "")


def test_what_is_imported_stays() -> None:
    script = """
import sys
import PIL
from expertd_inference import prepare_environment
prepare_environment(device="cpu")
print(sys.modules["PIL"] is PIL)
"""
    assert python(script).stdout == "True\n"


@pytest.fixture
def _collecting() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


@pytest.mark.usefixtures("_collecting")
def test_garbage_is_kept_only_inside() -> None:
    with suppress(KeyError), garbage_kept():
        assert not gc.isenabled()
        made: list[Any] = []
        made.append(made)
        raise KeyError
    assert gc.isenabled()
    assert any(each is made for each in gc.get_objects(generation=2)), "old without a look at it"
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("_collecting")
def test_garbage_of_who_collects_none() -> None:
    gc.disable()
    with garbage_kept():
        pass
    assert not gc.isenabled()
