"""The page on security: its scopes are those of the code, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from store.scopes import SCOPES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "security.md").read_text(encoding="utf-8")


def rows(name: str) -> list[list[str]]:
    """The cells of a marked table, without its head."""
    table = PAGE.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def existing_tests() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_the_scopes_are_those_of_the_code() -> None:
    assert {scope.strip("`"): what for scope, what in rows("scopes")} == dict(SCOPES)


def test_each_risk_names_tests_that_exist() -> None:
    risks = rows("owasp")
    assert [risk.split()[0] for risk, *_ in risks] == [f"API{number}" for number in range(1, 11)]
    there = existing_tests()
    for risk, could, stops, named in risks:
        tests = re.findall(r"`(\w+)`", named)
        assert could, risk
        assert stops, risk
        assert len(tests) >= 2, risk
        assert not set(tests) - there, risk
