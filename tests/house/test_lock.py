"""requirements.lock: exact versions, for any machine, of everything that pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINS = [
    line
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUPS = {"main": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def test_every_line_is_one_exact_public_version() -> None:
    pin = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*")  # no + (a local build), no @ (a path), no option
    assert [line for line in PINS if not pin.fullmatch(line)] == []


def test_nothing_belongs_to_one_build_of_torch() -> None:
    assert [line for line in PINS if re.match(r"nvidia|cuda|triton", line)] == []


def test_the_project_itself_is_not_in_it() -> None:
    assert not any(line.startswith("seuf") for line in PINS)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_requirement_is_pinned_within_its_range(group: str) -> None:
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in PINS)}
    for requirement in map(Requirement, GROUPS[group]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(version), (
            f"the lock has {version}, {requirement} is asked: run `make lock`"
        )
