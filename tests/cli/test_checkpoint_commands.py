"""`seuf apply-delta` and `seuf verify`, as typed: what they print, what they refuse, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from seuf_core.checkpoint.inspect import inspect_model
from seuf_core.checkpoint.writer import write_checkpoint
from tests import tiny
from tests.checkpoint.edits import contents, names

ONE = "model.layers.1.mlp.experts.2.down_proj.weight"  # of olmoe, [32, 16]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `model`, `other` (another model) and `made`, a checkpoint of the first."""
    root = tmp_path_factory.mktemp("made")
    tiny.write_model(root / "model", "olmoe", max_shard_size="40KB")
    tiny.write_model(root / "other", "olmoe", seed=5)
    write_checkpoint(root / "model", root / "made", {ONE: torch.zeros(32, 16)}, "seuf 1", {"seed": 3})
    return root


@pytest.fixture
def seuf(monkeypatch, capsys):
    """seuf("verify", folder): exit code, standard output and standard error."""
    from cli.main import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["seuf", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize("links", [(), ("--hardlinks",)])
def test_a_delta_gives_the_checkpoint_again(made, tmp_path, seuf, links):
    out = tmp_path / "out"
    code, said, told = seuf(
        "apply-delta", made / "model", made / "made" / "delta.safetensors", "--out", out, *links
    )
    assert (code, said) == (0, f"{out}\n"), told
    assert "every sha256 is the one that the delta promises" in told
    assert "512 of " in told
    assert contents(out) == contents(made / "made")
    linked = [name for name in names(out) if (out / name).stat().st_nlink > 1]
    assert bool(linked) == bool(links)


def test_as_json(made, tmp_path, seuf):
    out, delta = tmp_path / "out", made / "made" / "delta.safetensors"
    found = json.loads(seuf("apply-delta", made / "model", delta, "--out", out, "--json")[1])
    assert found["checkpoint"] == str(out)
    assert (found["tensors_changed"], found["parameters_changed"]) == (1, 512)
    assert found["base"] == inspect_model(made / "model").digest
    (out / "adapter_config.json").write_text("{}")
    checked = json.loads(seuf("verify", out, "--json")[1])
    assert checked == {**found, "not_listed": ["adapter_config.json"]}


def _refused(said: tuple[int, str, str]) -> str:
    code, out, error = said
    assert (code, out) == (1, "")
    line = error.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_what_cannot_be_applied_is_said_in_a_line(made, tmp_path, seuf):
    out, delta = tmp_path / "out", made / "made" / "delta.safetensors"
    broken = Path(shutil.copy(delta, tmp_path / "broken.safetensors"))
    with broken.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x3f")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(delta.read_bytes()[:-10])
    shard = next((made / "model").glob("model-*.safetensors"))
    for words, part in (
        ((made / "other", delta), "Give the base it was made from."),
        ((made / "model", broken), "is not the file that the delta promises"),
        ((made / "model", cut), "it is cut off"),
        ((made / "model", shard), "does not say what it changes"),
        ((made / "model", tmp_path / "none"), "none does not exist"),
        ((tmp_path / "none", delta), "base model"),
    ):
        assert part in _refused(seuf("apply-delta", *words, "--out", out))
        assert not out.exists()
    out.mkdir()
    assert f"{out} exists already" in _refused(seuf("apply-delta", made / "model", delta, "--out", out))
    assert names(out) == []


def test_verify_names_the_file_that_differs(made, tmp_path, seuf):
    folder = Path(shutil.copytree(made / "made", tmp_path / "copy"))
    code, said, told = seuf("verify", folder)
    assert (code, said) == (0, f"{folder}\n")
    assert "each is the one that manifest.json describes" in told
    (folder / "notes.txt").write_text("mine")
    assert "says nothing of notes.txt" in seuf("verify", folder)[2]
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert "tokenizer.json is not the file that" in _refused(seuf("verify", folder))
    assert "has no manifest.json" in _refused(seuf("verify", made / "model"))
