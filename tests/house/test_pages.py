"""What the documentation names is there: links, make targets, error codes."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{name} links to {target}"


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", index.read_text(encoding="utf-8")))
    pages = {str(page.relative_to(index.parent)) for page in index.parent.glob("**/*.md")} - {"README.md"}
    assert pages <= linked


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"^ {4}make ((?:[a-z-]+ ?)+)|`make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    used = {target for pair in named for words in pair for target in words.split()}
    assert used <= targets()


def test_make_help_lists_every_target_with_its_comment() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  make ([a-z-]+) +\S", result.stdout, re.MULTILINE))
    assert listed == targets()


_DATA = ("formats.py", "lines.py", "parquet.py", "parquet_child.py", "reader.py", "records.py", "rows.py")


def test_every_error_code_of_a_record_is_documented() -> None:
    source = "".join((ROOT / "seuf_core/data" / name).read_text() for name in _DATA)
    codes = set(re.findall(r"(?:LineProblem|_error|DataError)\((?:\s*0,)?\s*\"(\w+)\"", source))
    codes -= {"set_not_found", "invalid_set"}  # about a whole file that the library opens, not about records
    assert {"not_json", "no_examples", "file_too_large"} <= codes, "the pattern above no longer finds them"
    page = (ROOT / "docs/reference/records.md").read_text(encoding="utf-8")
    assert [code for code in sorted(codes) if f"`{code}`" not in page] == []
