"""The ``expert-run`` command."""

import sys
from collections.abc import Sequence


def main() -> None:
    """Runs the command. Whatever takes time to import comes after the first line."""
    from expertstore.interrupts import end_at_once

    end_at_once()
    if not serves_on_cpu(sys.argv[1:]):
        from expertd_inference.cli.commands import run

        run()
        return
    # Begun before all else, as this takes longest of a server's start.
    from expertd_inference.process.fork_server import start_imports, stop_imports

    start_imports()
    try:
        from expertd_inference.cli.commands import run

        run()
    finally:
        stop_imports()


def serves_on_cpu(arguments: Sequence[str]) -> bool:
    """Whether these start a server whose engines are forked, as far as can be seen at once."""
    others = ("--device", "--help", "-h")
    return [*arguments[:1]] == ["serve"] and not any(
        one.startswith(others) for one in arguments[1:]
    )
