"""Rows of a tenant are reached through store.repository alone: who builds queries by hand is named here, and why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from store import tables
from store.tables import Base, Tenanted

ROOT = Path(__file__).parents[2]
BUILDERS = {"select", "update", "delete", "insert", "text", "exists", "union", "union_all"}
TENANTED = {mapper.class_.__name__ for mapper in Base.registry.mappers if issubclass(mapper.class_, Tenanted)}

# Outside the store nobody builds queries but these.
OUTSIDE = {
    "api/ready.py": "how many workers are at work, of all tenants together",
    "worker/engine.py": "its own job, by the id that its supervisor gave it, and that job's model and checkpoint",
    "worker/telling.py": "whose a claimed job is, by its id",
}
# Modules of the store that build queries on tables of tenants by themselves.
ACROSS = {
    "store/audit.py": "heads of every tenant are due; the newest head beside the chain's own row",
    "store/census.py": "figures of the whole service",
    "store/durations.py": "of a job that its worker holds, by id",
    "store/events.py": "numbers the events of a job that its caller holds, by id",
    "store/fenced.py": "a worker's writes, by job id and lease token; rows get the job's tenant",
    "store/idempotency.py": "reserves by (tenant, key) in one INSERT; forgets old rows of every tenant",
    "store/keys.py": "finds whose key it is, before there is a tenant",
    "store/leases.py": "workers serve every tenant; a claim is by id",
    "store/orphans.py": "sweeps of stored bytes look at every tenant",
    "store/outbox.py": "the dispatcher tells of every tenant's jobs",
    "store/uploads.py": "expiry looks at every tenant",
    "store/webhooks.py": "the sender delivers for every tenant",
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def built_by(path: Path) -> list[str]:
    """The query builders of SQLAlchemy that a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sorted(
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sqlalchemy"
        for alias in node.names
        if alias.name in BUILDERS
    )


def queries_of(path: Path) -> list[str]:
    """`line: name(...)` of each query on a table of a tenant that is not made by the repository's own helpers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in BUILDERS | {"get", "get_one", "query"} or name.startswith("_"):
            continue
        named = {one.id for argument in node.args for one in ast.walk(argument) if isinstance(one, ast.Name)}
        named |= {
            one.attr for argument in node.args for one in ast.walk(argument) if isinstance(one, ast.Attribute)
        }
        if named & TENANTED:
            found.append(
                f"{path.relative_to(ROOT)}:{node.lineno}: {name}({', '.join(sorted(named & TENANTED))})"
            )
    return sorted(found)


@pytest.mark.parametrize("folder", ["api", "cli", "worker", "client", "telemetry"])
def test_outside_the_store_nobody_builds_queries(folder: str) -> None:
    for path in sources(folder):
        if str(path.relative_to(ROOT)) not in OUTSIDE:
            assert (built_by(path), queries_of(path)) == ([], []), path


def test_inside_it_only_those_named_leave_the_repository() -> None:
    found = {str(path.relative_to(ROOT)): queries_of(path) for path in sources("store")}
    unnamed = {path: queries for path, queries in found.items() if queries and path not in ACROSS}
    assert unnamed == {}


def test_those_named_need_it() -> None:
    for path in ACROSS:
        assert queries_of(ROOT / path), path
    for path in OUTSIDE:
        assert built_by(ROOT / path) or queries_of(ROOT / path), path


def test_the_look_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.house.test_tenant_queries.ROOT", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from sqlalchemy import select\n"
        "session.scalars(select(Job).where(Job.id == job_id))\n"
        "session.get(tables.File, file_id)\n"
        "self._select(Job)\n"
    )
    assert built_by(bad) == ["select"]
    assert queries_of(bad) == ["bad.py:2: select(Job)", "bad.py:3: get(File)"]
    assert tables.Job.__name__ in TENANTED
