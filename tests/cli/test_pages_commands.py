"""Every `seuf` command that a page shows can be typed: options exist, methods are possible, errors read as printed."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from cli.main import app, main

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def commands(page):
    """The words of each command; what a shell does with the output is left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: {4})?(?:\$ )?(seuf [^|&>\n]*)", text, re.MULTILINE):
        yield shlex.split(line, comments=True)


SHOWN = [(page.name, words) for page in PAGES for words in commands(page)]


def parsed(words):
    """The command and its context, as if it were about to run."""
    command, rest = get_command(app), words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, command.make_context(words[0], list(rest))


def test_pages_show_commands():
    assert {"run", "submit", "attribute", "up", "get"} <= {words[1] for _, words in SHOWN if len(words) > 1}


@pytest.mark.parametrize(
    ("page", "words"), SHOWN, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_a_shown_command_can_be_typed(page, words):
    if words[1:] and words[1] != "--version":
        command, _ = parsed(words)
        assert not getattr(command, "commands", None), f"{page} shows only a part of a command"


def advised():
    """Fragments such as `--scope lora --lora-rank 8`, with a value for an option that is only named."""
    text = (ROOT / "docs/how-to/choose-a-method.md").read_text(encoding="utf-8")
    fragments = [shlex.split(code) for code in re.findall(r"`(--[^`]+)`", text) if "..." not in code]
    return [words if len(words) > 1 else [*words, "1"] for words in fragments]


@pytest.mark.parametrize("words", advised(), ids=" ".join)
def test_a_method_that_is_advised_is_possible(words, monkeypatch, capsys):
    """Of all that is wrong with the command, the method is not."""
    monkeypatch.setattr(
        "sys.argv", ["seuf", "run", "--model", "m", "--forget", "nowhere", "--out", "o", *words]
    )
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: The forget set nowhere does not exist. Check the path.\n"


def refusals():
    for page in PAGES:
        for command, said in re.findall(
            r"^ {4}\$ (seuf .*)\n {4}(error: .*)$", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield shlex.split(command), said


@pytest.mark.parametrize(("words", "said"), list(refusals()))
def test_a_shown_refusal_is_what_is_said(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forget.jsonl").touch()
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f"{said}\n"


def test_the_patterns_above_still_find_something():
    assert len(advised()) > 10
    assert list(refusals())
