"""`seuf audit`: what it says of a whole log and of a broken one, from a file and from the service."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.services import wait_until
from tests.shell import Shell
from tests.store.test_chain import Log, a_log

CLI = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CLI:
    """The command in this process: exit code, output, errors."""
    from cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["seuf", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def write(log: Log, name: str = "audit.jsonl") -> str:
    Path(name).write_bytes(b"".join(log.export()))
    return name


def test_a_whole_log(cli: CLI) -> None:
    log = a_log()
    code, out, err = cli("audit", "verify", write(log))
    assert code == 0, err
    assert "rows 1 to 6 of default" in out
    assert "the last 2 rows: not signed yet" in out
    for said in ("--head", "--public-key", "holds the signing key", "everything that happened"):
        assert said in out  # what it cannot show
    assert json.loads(err.splitlines()[-1])["head"]["seq"] == 6


def test_with_a_key_and_a_head_that_were_kept(cli: CLI) -> None:
    """Then less is left unsaid. The head is what `verify` printed another day."""
    log = a_log()
    _, _, err = cli("audit", "verify", write(log))
    Path("kept.json").write_text(err.splitlines()[-1])
    Path("key.txt").write_text(json.dumps({"key_id": "x", "pem": _pem(log)}))
    for key in ("key.txt", log.heads[0].key_id):
        code, out, _ = cli("audit", "verify", "audit.jsonl", "--public-key", key, "--head", "kept.json")
        assert code == 0
        assert "each of the 1 heads" in out
        assert "--head" not in out
        assert "--public-key" not in out
    pages = [json.dumps({"data": [asdict(head)], "next": None}) for head in log.heads]
    Path("heads.jsonl").write_text("".join(pages))  # as `curl >>` leaves them
    assert "each of the 2 heads" in cli("audit", "verify", "audit.jsonl", "--head", "heads.jsonl")[1]
    log.rows, log.heads = log.rows[:4], log.heads[:1]
    assert cli("audit", "verify", write(log))[0] == 0  # by itself it cannot be told
    code, _, err = cli("audit", "verify", "audit.jsonl", "--head", "kept.json")
    assert code == 1
    assert "Row 4: the log ends here" in err
    code, _, err = cli("audit", "verify", "audit.jsonl", "--public-key", "0" * 64)
    assert (code, "another key" in err) == (1, True)


def _pem(log: Log) -> str:
    from store.signing import as_pem

    return as_pem(log.key.public_key())


def test_a_broken_log_names_the_row(cli: CLI) -> None:
    log = a_log()
    del log.rows[2]
    code, out, err = cli("audit", "verify", write(log), "--json")
    assert (code, json.loads(out)["row"], json.loads(out)["code"]) == (1, 4, "not_in_order")
    assert err.startswith("error: The audit log is broken. Row 4: ")
    code, out, _ = cli("audit", "verify", write(a_log()), "--json")
    assert (code, json.loads(out)["whole"], json.loads(out)["unsigned"]) == (0, True, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--from-service"),
        (("audit.jsonl", "--from-service"), "--from-service"),
        (("nowhere.jsonl",), "does not exist"),
        (("audit.jsonl", "--public-key", "audit.jsonl"), "holds no public key"),
        (("audit.jsonl", "--public-key", "nowhere.pem"), "does not exist"),
        (("audit.jsonl", "--head", "key.txt"), "holds no heads"),
        (("empty.jsonl",), "No signed head"),
    ],
)
def test_what_is_asked_wrongly(cli: CLI, arguments: tuple[str, ...], said: str) -> None:
    write(a_log())
    Path("key.txt").write_text("no head")
    Path("empty.jsonl").write_text("")
    code, _, err = cli("audit", "verify", *arguments)
    assert (code, said in err) == (1, True), err


def test_from_a_service(shell: Shell, tmp_path: Path) -> None:
    """Its own worker signs; the log on its disk is then tampered with: row 2, after that of the service's first key."""
    import sqlite3

    process = shell.start("--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["key"]
    (tmp_path / "forget.jsonl").write_text('{"text": "a"}\n')
    uploaded = shell.json("files", "upload", "forget.jsonl", "--purpose", "forget")["id"]
    wait_until(lambda: shell.run("audit", "verify", "--from-service").returncode == 0, 40, "the first head")
    assert shell.run("audit", "export", "--out", "audit.jsonl").returncode == 0
    verified = shell.run("audit", "verify", "audit.jsonl")
    assert verified.returncode == 0, verified.stderr
    (database,) = [
        Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names if name == "seuf.db"
    ]
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE audit SET object = 'file_other' WHERE object = ?", (uploaded,))
    broken = shell.run("audit", "verify", "--from-service")
    assert (broken.returncode, "Row 2: its content" in broken.stderr) == (1, True), broken.stderr
    assert shell.run("audit", "verify", "audit.jsonl").returncode == 0  # what was exported before still holds
