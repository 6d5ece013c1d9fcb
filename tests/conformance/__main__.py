"""Runs openai-python's own tests against the server, and says what they make of it.

python -m tests.conformance [--sdist openai-3.57.0.tar.gz]

The sdist of the installed version is fetched from the package index unless it is given.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.server import serving_http
from tests.conformance.cases import Case, Outcome, read_cases, table_of

ROOT = Path(__file__).parents[2]
FILES = [
    f"tests/api_resources/{name}.py"
    for name in (
        "test_completions",
        "chat/test_completions",
        "test_models",
        "test_responses",
        "responses/test_input_tokens",
    )
]
MODELS = ("gpt-3.5-turbo-instruct", "gpt-6-astra")
"""The models that the cases name."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
)
NOT_APPLICABLE = {
    r"To use the aiohttp client": "needs the client's extra `aiohttp`, not installed",
    r"suffix is not supported": "`suffix`: models served here fill no gaps",
    r"best_of is not supported": "`best_of` 0: refused, as is any that is not `n`",
    r"logit_bias has a key that is no token": '`logit_bias` for "foo": refused, as it is no token',
    r"functions is the old form of tools": "`functions`: the old form of `tools`, refused",
    r"max_tokens is 0": "`max_completion_tokens` 0: refused",
    r"background is not supported": "`background`: refused",
    r"conversation is not supported": "`conversation`: refused",
    r"There is no response 'resp_123'": "`previous_response_id` of a response that never was: 404",
}
"""What a failure says, and why the case does not apply."""


def main() -> int:
    """Exit code 0 if every case passed or does not apply, 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="of openai-python")
    sdist = parser.parse_args().sdist
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        suite = _unpacked(sdist or _fetched(directory), directory)
        packed, template = directory / "example", directory / "chat.jinja"
        template.write_text(TEMPLATE)
        pack(Request(ROOT / "examples/tiny-mixtral", packed, choose_scheme("4bit")))
        aliases = [part for model in MODELS for part in ("--alias", f"{model}=example")]
        with serving_http("--embedded", packed, "--chat-template", template, *aliases) as server:
            cases = _run(suite, f"{server.url}/v1", directory / "report.xml")
    print(f"openai-python {version('openai')}, {len(cases)} cases of create, list and count:\n")
    print(table_of(cases))
    failed = [case for case in cases if case.outcome is Outcome.FAILED]
    for case in failed:
        print(f"failed: {case.file} {case.name}", file=sys.stderr)
    return 1 if failed or not cases else 0


def _fetched(directory: Path) -> Path:
    """Not built: its tests are all that is wanted, and the package itself is installed."""
    asked = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", directory]
    subprocess.run(
        [sys.executable, "-m", "pip", *asked, f"openai=={version('openai')}"], check=True
    )
    return next(directory.glob("openai-*.tar.gz"))


def _unpacked(sdist: Path, directory: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    return next(path for path in directory.glob("openai-*") if path.is_dir())


def _run(suite: Path, url: str, report: Path) -> list[Case]:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-k", "create or list or count", f"--junitxml={report}", *FILES]
    environment = {**os.environ, "TEST_API_BASE_URL": url}
    subprocess.run(command, cwd=suite, env=environment, stdout=subprocess.DEVNULL, check=False)
    return [*read_cases(report, NOT_APPLICABLE)]


if __name__ == "__main__":
    sys.exit(main())
