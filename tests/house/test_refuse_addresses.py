"""scripts/refuse_addresses.py: what it finds, what it lets pass, and that no tracked file offends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Put together here, so that this file passes its own check.
SLASH = "/"


def run(*files: Path | str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "refuse_addresses.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "line",
    [
        f"model = {SLASH}work/main/model",
        f'path="{SLASH}root/.cache"',
        f"see {SLASH}home/anna/notes",
        f"{SLASH}tmp{SLASH}venv/bin/python",
        "--index-url https://" + "pypi" + ".org/simple",
        "https://" + "files.pythonhosted" + ".org/x.whl",
        "--extra-index-url https://" + "download.pytorch" + ".org/whl/cpu",
    ],
)
def test_an_offending_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "offender.txt"
    file.write_text(f"fine\n{line}\n")
    result = run(file)
    assert result.returncode == 1
    assert "offender.txt:2: " in result.stdout


@pytest.mark.parametrize(
    "line",
    [
        "DATA_DIR/work/<job id>",
        "{data_dir}/work/{job_id}",
        "https://arxiv.org/abs/2411.18797",
        "tmpfs: /tmp",
        "/data",
    ],
)
def test_an_innocent_line_passes(tmp_path: Path, line: str) -> None:
    file = tmp_path / "innocent.txt"
    file.write_text(line)
    assert run(file).returncode == 0


def test_no_tracked_file_offends() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, env=environment, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git checkout (a source archive)")
    files = [name for name in names.stdout.splitlines() if (ROOT / name).is_file()]
    assert files, "git ls-files names nothing"
    assert run(*files).stdout == ""
