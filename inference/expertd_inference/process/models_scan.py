"""Quickens what transformers does first of all: to look through the files of all its models.

It does so twice, since its cache has room for 128 folders and is asked for over five hundred,
one after the other; and in each file it looks at every line for the last that begins with
``__all__``. That is a sixth of a worker's start, whichever model it is about to load.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

SCANNER = "transformers.utils.import_utils"
_NAMES = "__all__"


def quicken_models_scan() -> None:
    """Before transformers is imported; afterwards there is nothing to gain."""
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _ScannerFinder())


class _ScannerFinder(MetaPathFinder):
    """Finds one module, once, and makes it quicker when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SCANNER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute: Callable[[ModuleType], None] = loader.exec_module

            def execute_and_quicken(module: ModuleType) -> None:
                execute(module)
                quicken(module)

            loader.exec_module = execute_and_quicken
        return spec


def quicken(scanner: Any) -> None:  # noqa: ANN401 - a module
    """Gives ``scanner`` room for all folders, and fewer lines to look at.

    Both are its own functions, called as it calls them; one that it lacks is left alone.
    """
    scan = getattr(getattr(scanner, "create_import_structure_from_path", None), "__wrapped__", None)
    if scan is not None:
        scanner.create_import_structure_from_path = functools.cache(scan)
    fetch = getattr(scanner, "fetch__all__", None)
    if fetch is not None:
        scanner.fetch__all__ = _of_last_lines(fetch)


def _of_last_lines(fetch: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    @functools.wraps(fetch)
    def fetch_at_once(file_content: str) -> list[str]:
        return fetch(file_content[max(0, file_content.rfind(f"\n{_NAMES}")) :].lstrip("\n"))

    return fetch_at_once
