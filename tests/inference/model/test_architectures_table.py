"""docs/architectures.md is what the sweep found, and what it would find today."""

from pathlib import Path

import transformers

from expertd_testing.tiny_models import CONFIGS
from tests.architectures.sweep import SCHEMES, try_architecture
from tests.architectures.table import PAGE, read_results, render
from tests.architectures.tiny_configs import architectures


def test_the_page_is_the_results() -> None:
    assert PAGE.read_text() == render(read_results()), "run make architectures"


def test_what_the_tests_run_is_in_it() -> None:
    rows = {result.architecture: result for result in read_results().results}
    for name in CONFIGS:
        assert rows[name].same == ("bf16", *SCHEMES)
        assert not rows[name].differs


def test_one_is_found_again(tmp_path: Path) -> None:
    committed = read_results()
    (row,) = (result for result in committed.results if result.architecture == "qwen2_moe")
    assert try_architecture("qwen2_moe", tmp_path) == row
    if committed.transformers == transformers.__version__:
        assert [result.architecture for result in committed.results] == architectures()
