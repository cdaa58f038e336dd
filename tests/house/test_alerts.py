"""The alert rules: Prometheus can read them, each figure in them is one that the service tells, each has its page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.metrics import Metrics
from store import duties
from store.database import Database
from tests.seeds import add_running

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/how-to/alerts.yml"
RULES: list[dict[str, Any]] = yaml.safe_load(FILE.read_text())["groups"][0]["rules"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_is_whole_and_has_its_place_in_the_page(rule: dict[str, Any]) -> None:
    assert (
        {"alert", "expr", "labels", "annotations"}
        <= rule.keys()
        <= {"alert", "expr", "for", "labels", "annotations"}
    )
    assert rule["labels"]["severity"] in ("page", "ticket")
    promql_parser.parse(rule["expr"])
    page, place = rule["annotations"]["runbook"].split("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert place in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_figures_are_those_of_the_service(tmp_path: Path, sqlite_template: Path) -> None:
    shutil.copy(sqlite_template, tmp_path / "seuf.db")
    database = Database(f"sqlite:///{tmp_path / 'seuf.db'}")
    held = add_running(database)
    held.phase("validating", 1, 1)
    held.succeed()
    with database.write() as session:
        duties.take(session, "release_expired", "someone", 60)
    metrics = Metrics(database)
    metrics.requests.labels("GET", "/jobs", "200").observe(0.1)
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    told = {sample.name for family in families for sample in family.samples}
    database.dispose()
    for rule in RULES:
        named = set(re.findall(r"\bseuf_\w+", rule["expr"]))
        assert named <= told, rule["alert"]
        assert named or rule["alert"] == "SeufDown"


def test_a_rule_that_prometheus_cannot_read_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"\S"):
        promql_parser.parse("max(seuf_jobs) >")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_promtool_accepts_them() -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", FILE], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
