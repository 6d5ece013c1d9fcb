"""The ``expert-run`` command."""


def main() -> None:
    """Runs the command. Whatever takes time to import comes after the first line."""
    from expertstore.interrupts import end_at_once

    end_at_once()
    from expertd_inference.cli.commands import run

    run()
