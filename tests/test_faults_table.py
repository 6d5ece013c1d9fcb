"""The fault table names tests, and they exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/faults.md"


def test_every_test_that_the_table_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert named
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text())
        functions = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
        functions |= {
            each.name for each in ast.walk(tree) if isinstance(each, ast.AsyncFunctionDef)
        }
        assert name in functions, f"{file} has no {name}"


def test_every_row_names_a_test() -> None:
    table = PAGE.read_text().partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    for row in rows[1:]:
        assert "::test_" in row, row
