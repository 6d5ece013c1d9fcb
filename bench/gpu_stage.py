"""One stage of ``make gpu-slot``, in this process: :mod:`bench.gpu_slot` has the others.

Example: python -m bench.gpu_stage same --fake --out build/gpu-slot --work /tmp/packs
"""

import argparse
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.gpu_figures import GpuFigure
from bench.gpu_rig import Rig, loaded
from bench.gpu_rows import SOME_FAILED, Rows
from bench.gpu_slot import MIXTRAL, QWEN, SCHEME
from bench.store import default_traces
from expertd_inference.process.environment import prepare_environment
from expertstore.errors import DeviceMemoryError

KERNEL_SCHEMES = ("4g64", "3g64m", "2g16m")
_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; SOME_FAILED if anything of it failed, as its rows say."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_stage")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where packs are")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--trace", type=Path, action="append")
    parser.add_argument("--fake", action="store_true")
    options = parser.parse_args(arguments)
    # As expert-run does: a worker then imports half as much.
    prepare_environment(device="cuda")
    rows = Rows(options.out, options.stage)
    rig = Rig(
        options.work,
        lambda message: print(message, flush=True),
        time.monotonic() + options.seconds,
        options.fake,
        tuple(options.trace or default_traces()),
    )
    try:
        STAGES[options.stage](rig, rows)
    except Exception as error:
        traceback.print_exc()
        rows.failed("the rest of it", error)
    return SOME_FAILED if rows.num_failed else 0


def _env(rig: Rig, rows: Rows) -> None:
    from bench import gpu_env

    gpu_env.measure(rig, rows)


def _probe(rig: Rig, rows: Rows) -> None:
    from bench import gpu_probe

    gpu_probe.measure(rig, rows)


def _same(rig: Rig, rows: Rows) -> None:
    from bench import gpu_same

    gpu_same.measure(rig, rows)


def _decode(rig: Rig, rows: Rows, shape: str = QWEN) -> None:
    from bench.gpu_decoder import Decoder
    from bench.gpu_ways import FAKE_TELLING, TELLING

    pack = rig.make_pack(shape, SCHEME)
    with loaded(rig, pack) as (_, session):
        decoder = Decoder(rig, shape, pack, session)
        rates = asdict(decoder.rates)
        rows.put(f"{shape}: rates of this host", **rates)
        ways = TELLING
        if rig.fake:
            ways = FAKE_TELLING if shape == QWEN else FAKE_TELLING[-1:]
        for way, budget, is_profiled in ways:
            what = f"{shape}, {way.name}, {budget >> 30} GiB"
            if not rig.has(10):
                rows.cut(what, "less than 10 s were left")
                continue
            settings = way.device_settings(decoder.manifest, budget, fake=rig.fake)
            profile = rows.path.parent / "profile.txt" if is_profiled else None
            with rows.part(what) as row:
                try:
                    decoded = decoder.decode(
                        settings,
                        cache_tokens=way.cache_tokens,
                        num_sequences=way.num_sequences,
                        profile=profile,
                    )
                except DeviceMemoryError as error:
                    row.update(status="skipped", reason=str(error))
                    continue
                row.update(decoded.row(settings.cache_bytes or 0, decoder.manifest.expert_bytes))


def _mixtral(rig: Rig, rows: Rows) -> None:
    _decode(rig, rows, MIXTRAL)


def _copies(rig: Rig, rows: Rows) -> None:
    from bench import gpu_copies

    with loaded(rig, rig.make_pack(QWEN, SCHEME)) as (_, session):
        for figure in gpu_copies.measure(rig, QWEN, session):
            _put(rows, figure)


def _kernels(rig: Rig, rows: Rows) -> None:
    from bench import gpu_kernels

    run, shapes = gpu_kernels.QUICK if rig.fake else gpu_kernels.FULL, gpu_kernels.SHAPES
    if rig.fake:
        rows.skipped("speed of the kernels", "interpreted here; only a GPU can tell")
        shapes = (gpu_kernels.TINY,)
    schemes = KERNEL_SCHEMES[:1] if rig.fake else KERNEL_SCHEMES
    for figure in gpu_kernels.measure(run, shapes, schemes, rig.say):
        _put(rows, figure)
        if not rig.has(15):  # what the next takes to compile
            rows.cut("the other kernels", "less than 15 s were left")
            break


def _tests(rig: Rig, rows: Rows) -> None:
    """What make gpu-test runs; on the fake device it is collected only."""
    command = [sys.executable, "-m", "tests.on_gpu", *(["--collect-only"] if rig.fake else [])]
    found: list[str] = []
    with (rows.path.parent / "tests.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if re.match(r"(FAILED|ERROR) ", line):
                rows.failed(line.split()[1], line.partition(" - ")[2].strip() or "see tests.txt")
            elif re.search(r"\d+ (passed|failed|tests? collected|skipped|errors?)", line):
                found.append(line.strip("= \n"))
    code = process.wait()
    rows.put("tests", ended=code, said="; ".join(found[-3:]))
    if rig.fake:
        rows.skipped("the results of the tests", "collected here; only a GPU can tell")
    if code and not rows.num_failed:
        rows.failed("tests", f"ended with code {code}; tests.txt says why")


def _hmm(rig: Rig, rows: Rows) -> None:
    from bench import gpu_probe

    gpu_probe.measure_hmm(rig, rows)


def _pack(shape: str) -> Callable[[Rig, Rows], None]:
    return lambda rig, _: rig.say(f"written: {rig.make_pack(shape, SCHEME)}")


def _put(rows: Rows, figure: GpuFigure) -> None:
    values = {name: value for name, value in asdict(figure).items() if value not in ("", None)}
    del values["part"]
    rows.put(str(values.pop("what")), **values)


STAGES: dict[str, Callable[[Rig, Rows], None]] = {
    "env": _env,
    "probe": _probe,
    "same": _same,
    "decode": _decode,
    "tests": _tests,
    "copies": _copies,
    "kernels": _kernels,
    "mixtral": _mixtral,
    "hmm": _hmm,
    f"pack-{QWEN}": _pack(QWEN),
    f"pack-{MIXTRAL}": _pack(MIXTRAL),
}


if __name__ == "__main__":
    sys.exit(main())
