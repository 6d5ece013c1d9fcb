"""Everything that only a GPU can tell, the most telling first, within a bounded time.

``make gpu-slot`` runs stages, each a process of its own that is killed with all that it started
at its limit. What a stage finds is written as it comes, so a run that is cut short has written
what it had: ``results.jsonl`` (a JSON object a line), ``summary.md`` (the same as tables),
``env.txt``, ``tests.txt``, ``profile.txt`` and ``log.txt`` in ``--out``. A stage that fails does
not end the others. Exit code 1: something failed; 2: this host cannot run it.

{stages}

Example: make gpu-slot GPU_SLOT="--seconds 300 --stages kernels,mixtral"
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_needs import SITE
from bench.gpu_rows import FILE, SOME_FAILED, Rows, read_rows
from bench.gpu_summary import line_of, summary

QWEN, MIXTRAL, SCHEME = "qwen3-30b-a3b", "mixtral-8x7b", "4bit"
SECONDS = 500.0
FAKE_LIMIT = 120.0
"""Of a stage on the fake device, whose machine may be busy."""
END_SECONDS = 5.0
"""Kept for killing the last stage and for the summary."""
PACK_BYTES = 12 << 30
"""More than a pack takes."""
LEAST_SECONDS = 8.0
"""A stage that has less is not begun."""
RESULTS = (FILE, "summary.md", "log.txt", "env.txt", "tests.txt", "profile.txt")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """What is run by ``bench.gpu_stage`` under this name, for ``seconds`` at most."""

    name: str
    seconds: float
    answers: str
    shape: str = ""
    """Of the pack that it loads."""
    unasked: bool = True
    """Whether it runs unless others are named."""


STAGES = (
    Stage("env", 30, "what the host is"),
    Stage("probe", 75, "what driver and GPU do by themselves: registration, launches, attention"),
    Stage("same", 100, "whether every way to decode gives the CPU's logits"),
    Stage(
        "decode",
        150,
        "tokens per second at the 30B-A3B shape, 1 to 16 sequences, beside each way's bound",
        QWEN,
    ),
    Stage("tests", 110, "make gpu-test"),
    Stage("copies", 45, "copies from the arena beside a plain pinned copy", QWEN),
    Stage("kernels", 135, "the kernels beside the GPU's memory"),
    Stage("mixtral", 110, "decode, at the shape of Mixtral-8x7B", MIXTRAL, unasked=False),
    Stage("hmm", 20, "whether kernels read memory that is not registered", unasked=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages; the exit code."""
    options = _options(arguments)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
    begin = time.monotonic()
    if not options.fake and _run([sys.executable, "-m", "bench.gpu_needs"], 60) != 0:
        return 2
    stages = [stage for stage in STAGES if stage.name in options.stages]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    place = None if options.fake else _place()
    with tempfile.TemporaryDirectory(prefix="gpu-slot-", dir=place) as work:
        slot = Slot(options, Path(work), begin)
        with slot.preparing(stages):
            for stage in stages:
                slot.run(stage)
    slot.say(f"written to {options.out}/summary.md and {options.out}/{FILE}")
    return int(slot.failed)


@dataclass
class Slot:
    """A run: its options, a folder for packs and caches, and when it began (monotonic)."""

    options: argparse.Namespace
    work: Path
    begin: float
    took: dict[str, str] = field(default_factory=dict)
    """How each stage ended."""
    failed: bool = False

    def __post_init__(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (self.options.out / name).unlink(missing_ok=True)
        self._end = self.begin + self.options.seconds - END_SECONDS
        self._jobs: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            # What is measured here is not for the user's workers to believe.
            "XDG_CACHE_HOME": str(self.work / "cache"),
        }
        if self.options.fake:
            # Before anything imports Triton.
            self._environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    @contextmanager
    def preparing(self, stages: Sequence[Stage]) -> Iterator[None]:
        """Meanwhile native code is built and the first pack written, on cores that are idle."""
        if not self.options.fake:
            self._jobs["native code"] = self._start([sys.executable, "hatch_build.py"])
            if shape := next((stage.shape for stage in stages if stage.shape), ""):
                self._jobs[shape] = self._start(self._command(f"pack-{shape}", 100))
        try:
            yield
        finally:
            for job in self._jobs.values():
                _end_group(job)

    def run(self, stage: Stage) -> None:
        """One stage; its rows are shown, and the summary is written."""
        rows = Rows(self.options.out, stage.name)
        num_before = len(read_rows(self.options.out))
        if stage.name not in ("env", "probe"):
            self._await("native code")
        if stage.shape:
            self._await(stage.shape)
            self._forget_packs(stage.shape)
        limit = FAKE_LIMIT if self.options.fake else stage.seconds
        limit = min(limit, self._end - time.monotonic())
        if limit < LEAST_SECONDS:
            rows.cut("all of it", f"{max(0.0, limit):.0f} s were left")
            self._ended(stage, "not run: no time left", num_before)
            return
        self.say(f"{stage.name}: {stage.answers} (at most {limit:.0f} s)")
        begin = time.monotonic()
        process = self._start(self._command(stage.name, limit - 3))
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        took = f"{time.monotonic() - begin:.0f} s"
        if code is None:
            rows.failed("all of it", f"killed at its limit of {limit:.0f} s")
        elif code not in (0, SOME_FAILED):
            rows.failed("all of it", f"ended with code {code}; log.txt says why")
        if code != 0:
            self.failed = True
        how = {0: "complete", SOME_FAILED: "with failures", None: "killed"}.get(
            code, f"with code {code}"
        )
        self._ended(stage, f"{how}, {took}", num_before)

    def say(self, message: str) -> None:
        """A line of progress."""
        line = f"[{time.monotonic() - self.begin:.0f} s] {message}"
        print(line, flush=True)
        with (self.options.out / "log.txt").open("a") as log:
            log.write(f"{line}\n")

    def _ended(self, stage: Stage, how: str, num_before: int) -> None:
        self.took[stage.name] = how
        rows = read_rows(self.options.out)
        for row in rows[num_before:]:
            print(line_of(row), flush=True)
        self.say(f"{stage.name}: {how}")
        partial = self.options.out / "summary.md"
        partial.write_text(summary(rows, self.took))

    def _command(self, name: str, seconds: float) -> list[str]:
        command = [sys.executable, "-m", "bench.gpu_stage", name]
        command += ["--out", str(self.options.out), "--work", str(self.work)]
        command += ["--seconds", f"{seconds:.0f}"]
        for trace in self.options.trace or ():
            command += ["--trace", str(trace)]
        return [*command, "--fake"] if self.options.fake else command

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.options.out / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=_ROOT,
                # A group of its own, which is killed with it.
                start_new_session=True,
            )

    def _await(self, job: str) -> None:
        """Until it has been prepared; a stage that lacks it says so itself."""
        if (process := self._jobs.pop(job, None)) is not None:
            try:
                code: int | None = process.wait(max(1.0, min(100.0, self._end - time.monotonic())))
            except subprocess.TimeoutExpired:
                code = None
            _end_group(process)
            if code != 0:
                self.say(f"preparing {job} {'took too long' if code is None else 'failed'}")
                # Half a pack is none: its stage writes it again.
                shutil.rmtree(self.work / f"{job}-{SCHEME}", ignore_errors=True)

    def _forget_packs(self, but: str) -> None:
        """Of all shapes but one: shared memory is memory."""
        for pack in self.work.glob(f"*-{SCHEME}"):
            if not pack.name.startswith(but):
                shutil.rmtree(pack, ignore_errors=True)


def _place() -> Path | None:
    """Where packs are written: shared memory, if there is enough of it."""
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > PACK_BYTES
    return shared if has_room else None


def _end_group(process: subprocess.Popen[Any]) -> None:
    """Kills a process and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number == signal.SIGTERM:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


def _run(command: Sequence[str], seconds: float) -> int:
    try:
        return subprocess.run(command, cwd=_ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{' '.join(command)} took more than {seconds:.0f} s", file=sys.stderr)
        return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    shown = "\n".join(
        f"  {stage.name:<8} {stage.seconds:>4.0f} s at most: {stage.answers}"
        f"{'' if stage.unasked else ' (if asked for)'}"
        for stage in STAGES
    )
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_slot",
        description=description.format(stages=f"Stages, in order:\n{shown}"),
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all; default: 500")
    parser.add_argument("--stages", help="names with commas between them")
    parser.add_argument("--trace", type=Path, action="append", help="routing to replay")
    parser.add_argument(
        "--out", type=Path, default=_ROOT / "build/gpu-slot", help="default: build/gpu-slot"
    )
    parser.add_argument("--fake", action="store_true", help="tiny, on the fake device: does it run")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    if options.stages is None:
        # The fake is to show that all of them work.
        options.stages = [stage.name for stage in STAGES if stage.unasked or options.fake]
    else:
        options.stages = options.stages.replace(",", " ").split()
        if unknown := [name for name in options.stages if name not in names]:
            parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(names)}")
    options.out = options.out.absolute()
    options.trace = [trace.absolute() for trace in options.trace or ()]
    return options


if __name__ == "__main__":
    sys.exit(main())
