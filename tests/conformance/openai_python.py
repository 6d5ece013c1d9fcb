"""openai-python's own tests of what it can create, list and count."""

from pathlib import Path

from tests.conformance.cases import Report, read_cases
from tests.conformance.outside import MODEL, Outside

VERSION = "3.57.0"
_PACKAGES = [f"openai[aiohttp]=={VERSION}", "pytest>=9,<10", "pytest-asyncio>=1.4,<2", "rich"]
_FILES = [
    f"tests/api_resources/{name}.py"
    for name in (
        "test_completions",
        "chat/test_completions",
        "test_models",
        "test_responses",
        "responses/test_input_tokens",
    )
]
_MODELS = ("gpt-3.5-turbo-instruct", "gpt-6-astra")
"""The models that the cases name."""
_NOT_APPLICABLE = {
    r"suffix needs a prompt of one text, and no echo": "`suffix` with `echo`: refused",
    r"functions is the old form of tools": "`functions`, `logit_bias` for foo, no tokens: refused",
    r"max_completion_tokens is 0": "`max_completion_tokens` 0: refused",
    r"background is not supported": "`background`: refused",
    r"conversation is not supported": "`conversation`: refused",
}


def run(outside: Outside, sdist: Path | None) -> Report:
    """Raises SuiteError."""
    suite = outside.source("openai", VERSION, sdist)
    python = outside.python("openai", _PACKAGES)
    report = outside.folder / "openai.xml"
    command = [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-k", "create or list or count", f"--junitxml={report}", *_FILES]
    aliases = [part for model in _MODELS for part in ("--alias", f"{model}={MODEL}")]
    with outside.served(*aliases) as server:
        outside.say("running its tests")
        outside.run_tests(command, cwd=suite, environment={"TEST_API_BASE_URL": f"{server.url}/v1"})
    return Report("openai-python", VERSION, [*read_cases(report, _NOT_APPLICABLE)])
