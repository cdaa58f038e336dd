"""The whole way with the artefacts in an object store: a real model, real processes, a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from client import Client
from store.artefacts import Artefacts
from tests import tiny
from tests.services import S3_SECRET
from tests.test_end_to_end import QUICK, examples, process, tensors


def run_job(folder: Path, model: Path, **environment: str) -> Path:
    """`seuf up` with these settings: upload, job, download. The folder that was downloaded."""
    folder.mkdir()
    arguments = ["cli.main", "up", "--json", "--port", "0", "--data-dir", str(folder / "data")]
    with process(folder, "up", *arguments, **environment) as up:
        assert up.stdout is not None
        announced = json.loads(up.stdout.readline())
        with Client(announced["url"], announced["key"]) as client:
            client.register_model("tiny", model)
            sets = {kind: client.upload(examples(folder, kind), kind)["id"] for kind in ("forget", "retain")}
            job = client.submit("tiny", sets["forget"], retain_set=sets["retain"], method=dict(QUICK))
            for _ in client.events(job["id"]):
                pass
            job = client.job(job["id"])
            assert job["status"] == "succeeded", job["error"]
            return client.download(str(job["checkpoint"]), folder / "out")


def test_a_job_on_an_object_store(tmp_path: Path, s3_bucket: str, s3_server: str) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    got = run_job(tmp_path / "s3", model, SEUF_ARTEFACTS_URL=s3_bucket)
    AutoModelForCausalLM.from_pretrained(got)
    before, after = tensors(model), tensors(got)
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert changed <= set(load_file(got / "delta.safetensors"))
    assert len(Artefacts(s3_bucket, s3_server).list("checkpoints")) == 1
    data = tmp_path / "s3" / "data"
    assert not (data / "artefacts").exists()
    assert list(data.rglob("*.safetensors")) == []  # nothing of the model stayed on the worker
    log = (tmp_path / "s3" / "up.log").read_text()
    assert log
    for secret in (S3_SECRET, "X-Amz-Signature"):
        assert secret not in log
