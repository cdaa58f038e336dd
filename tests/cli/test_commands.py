"""What needs no service: help, usage, the library's own commands, keys."""

import json
import subprocess
import sys

import pytest

from seuf_core.method import Splits
from tests.shell import write_sets

COMMANDS = {
    *("up", "submit", "watch", "get", "list", "cancel", "download", "run", "plan", "attribute"),
    *("apply-delta", "verify", "reference build"),
    *("models add", "models list", "files upload", "files list", "keys create", "keys list", "keys revoke"),
    *("keys rotate", "tenants create", "tenants list", "tenants set", "retry", "audit export", "audit verify"),
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


def test_every_field_of_the_method_is_an_option_with_its_range_and_default():
    from typer.main import get_command
    from typer.testing import CliRunner

    from cli.main import app
    from seuf_core.method import GROUPS, Method

    wanted = {f"--{name.replace('_', '-')}" for name in Method.model_fields} | {"--set"}
    pages = []
    for name in ("run", "submit", "attribute"):
        command = get_command(app).commands[name]
        options = {
            option.opts[0]
            for option in command.get_params(command.make_context(name, [], resilient_parsing=True))
        }
        assert wanted <= options, name
        page = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}).invoke(app, [name, "--help"]).output
        panels = [line.split("─")[1].strip() for line in page.splitlines() if line.startswith("╭─ ")]
        assert panels == ["Options", *GROUPS.values()]
        pages.append(" ".join(page.replace("│", " ").split()))
    for word in (
        "[0 < x <= 1; default 0.75]",
        "ce_u, wga, satimp, pdu.",
        "auto|NUMBER",
        "[default 0.5,0.2,0.3]",
    ):
        assert all(word in page for page in pages), word


FORMS = {
    ("--learning-rate-ladder", "1e-3,1e-4"): {"learning_rate_ladder": (1e-3, 1e-4)},
    ("--learning-rate-ladder", "1e-3"): {"learning_rate_ladder": (1e-3,)},
    ("--set", "learning_rate_ladder=[0.001, 0.01]"): {"learning_rate_ladder": (1e-3, 1e-2)},
    ("--splits", "0.6,0.2,0.2"): {"splits": Splits(train=0.6, selection=0.2, test=0.2)},
    ("--splits", '{"train": 0.4, "selection": 0.3, "test": 0.3}'): {
        "splits": Splits(train=0.4, selection=0.3, test=0.3)
    },
    ("--dpo-alternative", "42"): {"dpo_alternative": "42"},
    ("--experts", "3"): {"experts": 3},
    ("--experts", "auto"): {"experts": "auto"},
    ("--set", "npo-beta=0.2", "--set", "steps=9"): {"npo_beta": 0.2, "steps": 9},
}


@pytest.mark.parametrize("arguments", FORMS)
def test_values_can_be_written_as_people_write_them(arguments):
    import typer
    from typer.testing import CliRunner

    from cli.method import MethodCommand, given

    made = []
    app = typer.Typer()

    @app.command(cls=MethodCommand)
    def take(context: typer.Context) -> None:
        made.append(given(context)[1])

    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {name: getattr(made[0], name) for name in FORMS[arguments]} == FORMS[arguments]
    assert made[0].model_fields_set >= set(FORMS[arguments])


BAD_VALUES = {
    ("--steps", "0"): "steps: Input should be greater than or equal to 1; it is 0. Use 1 or more.",
    ("--experts", "many"): "experts: Input should be 'auto', or a valid integer",
    ("--objective", "wish"): "objective: 'wish' is none of the choices. Use one of 'gradient_ascent',",
    ("--splits", "0.5,0.5"): "'0.5,0.5' is not train,selection,test. Write it as 0.5,0.2,0.3.",
    ("--splits", "0.5,0.2,0.2"): "splits: train + selection + test is 0.9; make it 1",
    ("--set", "stepz=3"): "stepz is not a field of the method. Did you mean steps?",
    ("--set", "steps"): "--set steps has no value. Write it as --set name=value.",
    ("--steps", "3", "--set", "steps=4"): "steps is given twice. Give it once.",
    (
        "--steps",
        "0",
        "--batch-size",
        "0",
    ): "steps: Input should be greater than or equal to 1; it is 0. (and 1 more)",
    ("--scope", "top_m"): "scope top_m takes a given number of experts, and experts is auto. Give experts,",
}


@pytest.mark.parametrize("arguments", BAD_VALUES)
def test_a_bad_value_names_field_rule_and_fix(arguments, capsys, monkeypatch):
    from cli.main import main

    monkeypatch.setattr(
        "sys.argv", ["seuf", "run", "--model", "m", "--forget", "f", "--out", "o", *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {BAD_VALUES[arguments]}")


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


def test_the_table_of_figures_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    from cli import output

    monkeypatch.setenv("COLUMNS", "80")
    row = {"set": "forget", "domain": "chemistry", "value": 1.0, "n": 196, "chance": 0.25}
    stages = ("after_masked", "before", "after", "before_masked")
    output.print_metrics(
        [{**row, "name": name, "stage": s} for name in ("ranked_last", "choice") for s in stages]
    )
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["set", "domain", "figure", "before", "masked", "after", "masked", "chance", "n"]
    assert [first.split()[2], second.split()[2]] == ["choice", "ranked_last"]


def test_a_selection_is_told_once_and_again_only_after_another(capsys):
    from cli.live import Live

    live = Live()
    one, two = ({"layer": 0, "expert": expert} for expert in (3, 5))
    for chosen in ([one], [one], [one, two], [one]):
        live.selected(chosen)
    assert capsys.readouterr().err.splitlines() == [
        "selected: layer 0 expert 3",
        "selected: layer 0 expert 3, layer 0 expert 5",
        "selected: layer 0 expert 3",
    ]


@pytest.mark.parametrize("phase", ["attributing", "unlearning"])
def test_ctrl_c_ends_a_phase_in_which_nothing_is_worth_saving_at_once(phase, capsys):
    import signal

    from cli.here import Shown
    from cli.live import Live
    from seuf_core.errors import Cancelled

    kept = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        shown = Shown(Live())
        shown.phase(phase, 1, 9)
        signal.raise_signal(signal.SIGINT)
        assert shown.cancelled()
        if phase == "attributing":
            with pytest.raises(Cancelled):
                shown.phase(phase, 2, 9)
        else:
            shown.phase(phase, 2, 9)  # the loop writes a training checkpoint first
    finally:
        signal.signal(signal.SIGINT, kept[0])
        signal.signal(signal.SIGTERM, kept[1])
