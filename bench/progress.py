"""What is shown while a benchmark runs."""

from rich.console import Console
from rich.status import Status


def progress(console: Console, text: str) -> Status:
    """A line that says what is being done, by its ``update``.

    Redrawn once a second: twelve times, as usual, took 4 % from a worker in the same process.
    """
    return console.status(text, refresh_per_second=1)
