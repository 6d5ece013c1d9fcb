"""``python -m expertd``: the ``expertd`` command."""

from expertd.cli import main

main()
