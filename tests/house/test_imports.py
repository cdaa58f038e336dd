"""What may import what: the contract holds and notices violations; the fast programs start without torch."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
    "root_packages"
]
# The modules of the library that the API may use: none of them loads torch.
EDGE = {
    "seuf_core.version",
    "seuf_core.errors",
    "seuf_core.method",
    "seuf_core.misfits",
    "seuf_core.families",
    "seuf_core.attribution.heatmap",
    "seuf_core.data.formats",
    "seuf_core.data.reader",
    "seuf_core.data.records",
    "seuf_core.checkpoint.index",
    "seuf_core.checkpoint.inspect",
    "seuf_core.checkpoint.manifest",
    "seuf_core.plan.estimate",
    "seuf_core.plan.facts",
}
# Every program of the API's image (Dockerfile) and what a person starts most often.
FAST = ["api.main", "cli.main", "client", "migrations.__main__", "store", "worker.dispatcher", *sorted(EDGE)]
# A finder in front of all others, so that even an import inside `try` is seen.
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "safetensors", "peft", "pyarrow"}:
            sys.exit(f"imports {name}")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize("module", FAST)
def test_starts_without_torch(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"{REFUSE}\nimport {module}"],
        cwd=ROOT,
        env=os.environ | {"SEUF_SECRET": "a secret of this test, long enough for anybody"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_the_refusal_above_refuses() -> None:
    result = subprocess.run([sys.executable, "-c", f"{REFUSE}\nimport torch"], capture_output=True, text=True)
    assert "imports torch" in result.stderr


def imported(file: Path) -> set[str]:
    """The modules that `file` imports; for `from a import b` both a and a.b, since b may be either."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_the_api_uses_only_the_edge_of_the_library() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "seuf_core").rglob("*.py")
    }
    used = set().union(*(imported(path) for path in (ROOT / "api").rglob("*.py"))) & modules
    packages = {"seuf_core", *(f"seuf_core.{part}" for part in ("attribution", "data", "checkpoint", "plan"))}
    assert used <= EDGE | packages


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([str(tool), "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_the_contract_holds() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("store/settings.py", "import client"),
        ("store/settings.py", "import api"),
        ("client/__init__.py", "import seuf_core.errors"),
        ("seuf_core/errors.py", "import store.ids"),
        ("worker/__init__.py", "import api"),
        ("api/__init__.py", "import worker"),
        ("api/__init__.py", "import cli"),
        ("api/__init__.py", "import torch"),
        ("seuf_core/method.py", "import torch"),  # the API would load it through the library
        ("seuf_core/errors.py", "import seuf_core.method"),
        ("seuf_core/checkpoint/__init__.py", "import seuf_core.moe"),
    ],
)
def test_the_contract_notices(tmp_path: Path, file: str, line: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout
