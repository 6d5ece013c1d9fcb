"""Killed at any moment, a packing goes on where it was, and its bytes are the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.packing.packer import Progress, Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[3]

STEPS = 18
"""10 tensors of the trunk and 8 experts."""
MOMENTS = ("0", "1", "12", "17", "18", "uncommitted", "torn", "_prepare", "_finish",
           "file_checksum", "encode_manifest", "rename", "cleanup")  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer."""
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("source") / "m", num_hidden_layers=1)


@pytest.fixture(scope="module")
def victims(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each victim left."""
    folder = tmp_path_factory.mktemp("victims")
    sparse = shutil.copytree(source, tmp_path_factory.mktemp("sparse") / "m")
    make_sparse(sparse, num_layers=6, intermediate_size=5504)
    assert (sparse / "model.safetensors").stat().st_size > 200e6
    program = [sys.executable, "-m", "tests.expert_store.packing.victims"]
    subprocess.run([*program, source, sparse, folder, *MOMENTS], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("uninterrupted") / "pack"
    pack(Request(source, path, choose_scheme("4bit"), optimize=False))
    return contents(path)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_packing_goes_on(
    moment: str, victims: Path, uninterrupted: dict[str, bytes], source: Path
) -> None:
    destination, partial = victims / moment, victims / f"{moment}.partial"
    assert destination.exists() is (moment == "cleanup")  # a pack is whole or absent
    done = max(len((partial / "journal").read_bytes().splitlines()) - 1, 0)
    notices: list[str] = []
    resumed = []
    pack(
        Request(source, destination, choose_scheme("4bit"), optimize=False),
        on_progress=lambda progress: resumed.append(progress.done_steps),
        on_notice=notices.append,
    )
    assert contents(destination) == uninterrupted
    assert not partial.exists()
    if moment.isdigit():
        assert done == int(moment)
    if moment == "cleanup":
        assert notices == [f"{destination} was complete already."]
    elif done:
        assert notices == [f"Going on after {done} of {STEPS} steps."]
        assert resumed[0] == done
    else:
        assert not notices


@pytest.mark.parametrize("change", ["scheme", "optimize", "source", "size", "solver"])
def test_another_packing_begins_anew(
    change: str,
    uninterrupted: dict[str, bytes],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = Request(source, tmp_path / "pack", choose_scheme("4bit"), optimize=False)
    interrupt(request, before_step=14)
    # What was done is committed, however short ago.
    assert len((tmp_path / "pack.partial/journal").read_text().splitlines()) == 1 + 14
    if change == "scheme":
        request = replace(request, scheme=choose_scheme("8bit"))
    elif change == "optimize":
        request = replace(request, optimize=True)
    elif change == "solver":  # without native code, or else with another version of it
        monkeypatch.setenv("EXPERTD_NATIVE", "0")
        monkeypatch.setattr("expertd.packing.hqq_solver.version", lambda _: "0.3")
    elif change == "source":
        request = replace(request, source=shutil.copytree(source, tmp_path / "copy"))
        os.utime(request.source / "model.safetensors", (0, 0))
    else:
        with (tmp_path / "pack.partial/pack/trunk.safetensors").open("r+b") as file:
            file.truncate(100)
    notices = interrupt(request, before_step=0)
    assert notices == [f"{tmp_path}/pack.partial is of another packing; beginning anew."]
    if change in {"source", "size"}:
        pack(request)
        assert contents(tmp_path / "pack") == uninterrupted


def interrupt(request: Request, *, before_step: int) -> list[str]:
    """Packs until the keyboard interrupts; returns the notices."""
    notices: list[str] = []

    def on_progress(progress: Progress) -> None:
        if progress.done_steps == before_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(request, on_progress=on_progress, on_notice=notices.append)
    return notices


def test_the_command_survives_kill_9(
    uninterrupted: dict[str, bytes], source: Path, tmp_path: Path
) -> None:
    """The real command, killed at some moment of its work."""
    command = [sys.executable, "-m", "expertd", "pack", str(source),
               str(tmp_path / "pack"), "--no-optimize"]  # fmt: skip
    journal = tmp_path / "pack.partial/journal"
    for _ in range(5):  # a machine on which this process has to wait lets the victim finish
        shutil.rmtree(tmp_path / "pack", ignore_errors=True)
        victim = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not journal.exists() and victim.poll() is None:
            pass  # the whole work takes some 20 ms
        victim.send_signal(signal.SIGKILL)
        if victim.wait() == -signal.SIGKILL and journal.exists():
            break
    assert journal.exists()
    assert not (tmp_path / "pack").exists()
    pack(Request(source, tmp_path / "pack", choose_scheme("4bit"), optimize=False))
    assert contents(tmp_path / "pack") == uninterrupted


def test_memory_does_not_grow_with_the_checkpoint(victims: Path) -> None:
    """200 MB of experts, in a sparse file of zeros, take what a few of them do."""
    # Experts of 4 MB; the rest is the model on the meta device and what torch loads when used.
    assert int((victims / "memory").read_text()) < 80e6


def make_sparse(path: Path, *, num_layers: int, intermediate_size: int) -> None:
    """Enlarges a Mixtral checkpoint of one layer, with a file that takes no disk."""
    from expertstore.pack.tensor_file import build_header, read_header

    config = json.loads((path / "config.json").read_bytes())
    config |= {"num_hidden_layers": num_layers, "intermediate_size": intermediate_size}
    (path / "config.json").write_text(json.dumps(config))
    tensors = []
    for entry in read_header(path / "model.safetensors").values():
        shape = tuple(intermediate_size if n == 256 and "experts" in entry.name else n
                      for n in entry.shape)  # fmt: skip
        layers = range(num_layers) if ".layers.0." in entry.name else [0]
        for layer in layers:
            name = entry.name.replace(".layers.0.", f".layers.{layer}.")
            tensors.append((name, entry.dtype, shape))
    header = build_header(tensors)
    num_bytes = sum(2 * shape[0] * (shape[1] if shape[1:] else 1) for _, _, shape in tensors)
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + num_bytes)
