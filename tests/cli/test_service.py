"""The commands of a running service, as a user types them."""

import json
import stat

import pytest

SUBMIT = ("submit", "--model", "tiny", "--forget", "forget.jsonl", "--retain", "retain.jsonl")


def test_a_model_folder_is_registered_once(home):
    first, second = (home.json(*SUBMIT, "--preset", "paper", "--experts", 2, "--seed", 3) for _ in range(2))
    assert first["model"] == second["model"]
    (model,) = home.json("models", "list")["data"]
    assert (model["id"], model["name"]) == (first["model"], "tiny")
    method = first["method"]
    assert (method["preset"], method["experts"], method["seed"]) == ("paper", 2, 3)


def test_a_job_is_shown_listed_cancelled_and_watched_to_its_end(home):
    submitted = home.run(*SUBMIT, "--metadata", "ticket=7", "--set", "npo_beta=0.2")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    assert f"seuf watch {job}" in submitted.stderr
    assert "ticket=7" in home.run("get", job).stdout
    assert job in home.run("list", "--status", "queued").stdout
    early = home.run("download", job)
    assert early.returncode == 1
    assert f"seuf watch {job}" in early.stderr
    assert home.run("cancel", job).stdout.strip() == "cancelled"
    assert job not in home.run("list", "--status", "queued").stdout
    watched = home.run("watch", job, "--json")
    assert watched.returncode == 1
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [(event["seq"], event["data"]["status"]) for event in events] == [(1, "queued"), (2, "cancelled")]


def test_files_and_models_are_named_by_id_too(home):
    file = home.json("files", "upload", "evaluation.jsonl", "--purpose", "evaluation")
    assert file["examples"] == 24
    assert file["id"] in home.run("files", "list").stdout
    model = home.json("models", "add", home.home / "tiny", "--name", "second")
    assert "second" in home.run("models", "list").stdout
    job = home.json(*SUBMIT, "--evaluation", file["id"], "--model", model["id"])
    assert (job["evaluation_set"], job["model"]) == (file["id"], model["id"])


BAD = {
    "no such file": (("--forget", "nowhere.jsonl"), "does not exist"),
    "broken line": (("--forget", "broken.jsonl"), "line 2"),
    "unknown model": (("--model", "nobody"), "models"),
    "out of range": (("--steps", "0"), "steps"),
    "unknown field": (("--set", "stepz=3"), "stepz"),
    "no value": (("--set", "steps"), "--set name=value"),
    "wrong purpose": (("--retain", "forget-id"), "purpose=retain"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refusal_is_one_line_with_a_fix(home, case):
    options, word = BAD[case]
    (home.home / "broken.jsonl").write_text('{"text": "fine"}\n{broken\n')
    if case == "wrong purpose":
        options = ("--retain", home.json("files", "upload", "forget.jsonl", "--purpose", "forget")["id"])
    done = home.run(*SUBMIT, *options)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert word in line


def test_a_method_that_the_service_would_refuse_uploads_nothing(home):
    before = home.json("files", "list")
    (home.home / "new.jsonl").write_text('{"text": "never uploaded"}\n')
    base = ("submit", "--model", "tiny", "--forget", "new.jsonl")
    for options, word in (((), "no retain set"), (("--retain", "retain.jsonl", "--steps", "0"), "steps")):
        done = home.run(*base, *options)
        assert (done.returncode, word in done.stderr) == (1, True)
    assert home.json("files", "list") == before


def test_a_picture_that_is_not_there_yet(home):
    job = home.json(*SUBMIT)["id"]
    done = home.run("get", job, "--heatmap", "map.svg")
    assert done.returncode == 1
    assert "has no attribution" in done.stderr
    assert not (home.home / "map.svg").exists()
    home.run("cancel", job)


def test_the_saved_key_goes_to_the_saved_address_only(home):
    config = home.home / "config" / "seuf" / "config.json"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    saved = json.loads(config.read_text())
    stranger = home.run("list", "--url", "http://127.0.0.1:9")
    assert stranger.returncode == 1
    assert "no API key for http://127.0.0.1:9" in stranger.stderr
    wrong = home.run("list", SEUF_API_KEY="seuf_wrong")
    assert "not valid" in wrong.stderr
    right = home.run("list", "--json", "--url", saved["url"], "--key", saved["key"])
    assert right.returncode == 0
