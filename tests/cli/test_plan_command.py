"""`seuf plan`: a table for people, JSON for programs, and nothing is changed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.shell import write_sets

INPUTS = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")


@pytest.fixture
def planned(shell, tiny_model):
    write_sets(shell.home)

    def plan(*arguments):
        return shell.run("plan", "--model", str(tiny_model), *INPUTS, *arguments)

    return plan


def test_a_plan_without_calibration_has_no_seconds(planned, shell):
    before = sorted(shell.home.rglob("*"))
    done = planned("--no-calibrate", "--json", "--memory", "6GB", "--experts", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["budget_bytes"], found["budget_why"]) == (6 * 10**9, "what was given")
    assert (found["experts"], found["seconds"], found["residency"]) == (2, None, "whole")
    assert sorted(shell.home.rglob("*")) == before


def test_a_calibrated_plan_is_a_table_with_times(planned):
    done = planned("--set", "steps=5")
    assert done.returncode == 0, done.stderr
    for word in ("attributing", "unlearning", "publishing", "peak memory", "device", "cpu: no accelerator"):
        assert word in done.stdout
    assert "note: Which experts are trained is not known" in done.stderr


def test_what_cannot_be_planned_is_one_line(planned):
    done = planned("--memory", "lots", "--no-calibrate")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'lots' is no size of memory.")


def test_help_and_a_bare_plan_load_no_torch(tiny_model, tmp_path):
    write_sets(tmp_path)
    sets = [str(tmp_path / word) if word.endswith("jsonl") else word for word in INPUTS]
    for arguments in (["--help"], ["--model", str(tiny_model), *sets, "--no-calibrate"]):
        program = (
            f"import sys; sys.argv = ['seuf', 'plan', *{arguments!r}]\n"
            "try:\n    from cli.main import main; main()\n"
            "except SystemExit: pass\n"
            "print([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", arguments
