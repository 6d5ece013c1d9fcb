"""``python -m tests.architectures``: tries all architectures and writes docs/architectures.md.

A minute on an idle core. With names, tries these and leaves the others' rows as they are::

    python -m tests.architectures mixtral qwen3_next
"""

import os
import sys
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import msgspec
from transformers.utils import logging

from tests.architectures.sweep import Result, sweep
from tests.architectures.table import PAGE, RESULTS, merge, read_results, render


def main(names: list[str]) -> int:
    """Exit code 0, or 1 if an architecture that can be packed does not say what stock says.

    Nor if several sequences at once do not get what each gets alone.
    """
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def show(result: Result) -> None:
        outcome = result.refused or f"same: {', '.join(result.same) or 'none'}"
        if result.differs:
            outcome += f"; differs: {', '.join(result.differs)}"
        if result.together:
            outcome += f"; together: {result.together}"
        sys.stdout.write(f"{result.architecture}: {outcome}\n")
        sys.stdout.flush()

    results = sweep(names, show)
    if names:
        results = merge(read_results(), results)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    PAGE.write_text(render(results))
    wrong = [x for x in results.results if x.differs or x.together == "different"]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
