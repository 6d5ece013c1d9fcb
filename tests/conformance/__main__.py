"""Runs what others wrote against the server, and says what they make of it.

Suites: openai (openai-python's own tests), llama (those of llama.cpp's server), lm-eval
(perplexities and answers), load (aiperf, whose figures are held against /metrics). Each is
installed from the package index into an environment of its own, and gets the example model, served
as a user would. Nothing else is fetched: no model, no data.

Prints Markdown for docs/conformance.md. The exit code is 1 if a case failed or a suite could not be
run.

Example: python -m tests.conformance --only lm-eval --environments ~/.cache/conformance
         python -m tests.conformance --skip load --json
         python -m tests.conformance --only openai --sdist openai=openai-3.57.0.tar.gz
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.conformance import llama_cpp, lm_eval_suite, load_generator, openai_python
from tests.conformance.cases import Report, details_of, overview_of
from tests.conformance.outside import Outside, SuiteError

SUITES: dict[str, Callable[[Outside, Path | None], Report]] = {
    "openai": openai_python.run,
    "llama": llama_cpp.run,
    "lm-eval": lm_eval_suite.run,
    "load": load_generator.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if every case passed or does not apply."""
    options = _parser().parse_args(arguments)
    chosen = [name for name in options.only or SUITES if name not in options.skip]
    sdists = dict(options.sdist)
    reports, broken = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            own = Path(folder) / name
            own.mkdir()
            outside = Outside(own, options.environments or Path(folder) / "env", _sayer(name))
            try:
                reports.append(SUITES[name](outside, sdists.get(name)))
            except SuiteError as error:
                print(f"{name}: {error}", file=sys.stderr)
                broken.append(name)
    failed = [(report.suite, case) for report in reports for case in report.failed]
    for suite, case in failed:
        print(f"failed: {suite}: {case.file} {case.name}: {case.reason}", file=sys.stderr)
    if options.json:
        print(json.dumps([asdict(report) for report in reports]))
    else:
        print(overview_of(reports))
        for report in reports:
            print(f"\n## {report.suite} {report.version}\n\n{details_of(report)}")
    return 1 if failed or broken or not all(report.cases for report in reports) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(SUITES)
    parser.add_argument("--only", action="append", choices=SUITES, metavar="SUITE", help=names)
    parser.add_argument("--skip", action="append", choices=SUITES, metavar="SUITE", default=[])
    parser.add_argument(
        "--sdist",
        action="append",
        default=[],
        type=_sdist,
        metavar="SUITE=FILE",
        help="a source distribution that is there already: openai's, or llama_cpp_python's",
    )
    parser.add_argument(
        "--environments",
        type=lambda text: Path(text).expanduser().resolve(),
        metavar="DIR",
        help="keep the environments here for the next run; default: they are removed",
    )
    parser.add_argument("--json", action="store_true", help="every case, instead of tables")
    return parser


def _sdist(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in ("openai", "llama") or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not openai=FILE or llama=FILE")
    return name, Path(path).resolve()


def _sayer(name: str) -> Callable[[str], None]:
    return lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
