"""What needs no service: help, usage, the library's own commands, keys."""

import json
import subprocess
import sys

import pytest

from tests.shell import write_sets

COMMANDS = {
    *("up", "submit", "watch", "get", "list", "cancel", "download", "run", "reference build"),
    *("models add", "models list", "files upload", "files list", "keys create", "keys list", "keys revoke"),
}


def test_help_loads_nothing_heavy(shell):
    program = (
        "import sys; sys.argv = ['seuf', '--help']\n"
        "try:\n    from cli.main import main; main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'httpx', 'pydantic', 'sqlalchemy', 'fastapi', 'uvicorn')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_command_explains_itself():
    from typer.main import get_command

    from cli.main import app

    seen = []

    def walk(command, path):
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, [*path, name])
        if not getattr(command, "commands", None):
            seen.append(" ".join(path))
            assert command.help, path
            assert command.epilog.startswith(f"Example:  seuf {' '.join(path)}"), path
            assert any("--json" in option.opts for option in command.params), path

    walk(get_command(app), [])
    assert set(seen) == COMMANDS


@pytest.mark.parametrize(
    "arguments", [("get",), ("submit", "--model", "x"), ("nonsense",), ("list", "--limit", "0")]
)
def test_wrong_usage_is_exit_code_2(shell, arguments):
    assert shell.run(*arguments).returncode == 2


def test_the_version(shell):
    from seuf_core import __version__

    assert shell.run("--version").stdout.strip() == __version__


def test_without_a_service_the_fix_is_named(shell):
    done = shell.run("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "seuf up" in done.stderr
    nobody = shell.run("list", "--url", "http://127.0.0.1:9", "--key", "k")
    assert "cannot be reached" in nobody.stderr
    assert len(nobody.stderr.splitlines()) == 1


def test_keys_are_made_shown_and_revoked(shell):
    from store import migrate

    url = f"sqlite:///{shell.home / 'seuf.db'}"
    migrate.upgrade(url)
    environment = {"SEUF_DATABASE_URL": url, "SEUF_SECRET": "s"}
    made = json.loads(shell.run("keys", "create", "--name", "ci", "--json", **environment).stdout)
    assert made["key"].startswith("seuf_")
    assert shell.run("keys", "revoke", made["id"], **environment).returncode == 0
    (row,) = json.loads(shell.run("keys", "list", "--json", **environment).stdout)
    assert (row["name"], row["revoked"]) == ("ci", True)
    assert made["key"] not in str(row)
    unknown = shell.run("keys", "revoke", "key_nobody", **environment)
    assert (unknown.returncode, unknown.stderr.startswith("error: ")) == (1, True)


def test_run_refuses_before_it_loads_anything(shell, tiny_model):
    (shell.home / "f.jsonl").write_text('{"text": "x"}\n')
    base = ("run", "--model", tiny_model, "--out", "out")
    missing = shell.run(*base, "--forget", "nowhere.jsonl")
    assert "nowhere.jsonl does not exist" in missing.stderr
    wrong = shell.run(*base, "--forget", "f.jsonl", "--steps", "0")
    assert wrong.stderr.startswith("error: steps: ")
    unfit = shell.run(*base, "--forget", "f.jsonl", "--set", "retain_loss=hidden_mse")
    assert "retain_loss" in unfit.stderr
    for done in (missing, wrong, unfit):
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_run_unlearns_here_and_prints_the_table(shell, tiny_model):
    write_sets(shell.home)
    done = shell.run(
        *("run", "--model", tiny_model, "--forget", "forget.jsonl", "--retain", "retain.jsonl"),
        *("--out", "out", "--work", "work", "--steps", "2", "--learning-rate", "0.001", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {row["stage"] for row in result["metrics"]} >= {"before", "after"}
    assert (shell.home / "out" / "manifest.json").exists()
    assert 0 < result["parameters_changed"] < result["parameters_total"]
