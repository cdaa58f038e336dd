"""Dockerfile, .dockerignore and docker-compose.yml without a Docker engine: structure, names, secrets."""

import fnmatch
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house.images import ROOT, compose, interpolate, stages

GIVEN = {"SEUF_MODELS": "/models-of-the-host"}
STAGES = stages()
SERVICES = compose(GIVEN)["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
IMAGES = {"api": "api", "worker": "worker"}  # final stage: what compose calls it in build.target


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_compose_follows_the_specification() -> None:
    tool = str(Path(sys.executable).with_name("check-jsonschema"))
    result = run(tool, "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_compose_stops_when_a_value_is_missing(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        compose({key: value for key, value in GIVEN.items() if key != name})


@pytest.mark.parametrize("text", ["$HOME", "${HOME}", "a ${X"])
def test_a_variable_that_could_be_silently_empty_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        interpolate(text, {})


def test_no_password_stands_in_the_file_or_in_an_environment() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|AUTH|KEY", variable):
                assert value.startswith("/run/secrets/"), f"{name}: {variable}"
            assert not re.search(r"://[^/@]*:[^/@]+@", value), f"{name}: {variable} has a password"


def test_each_service_is_shown_the_secrets_that_it_names_and_no_other() -> None:
    declared = compose(GIVEN)["secrets"]
    for name, service in SERVICES.items():
        named = set(re.findall(r"/run/secrets/(\w+)", json.dumps(service)))
        assert named == set(service.get("secrets", ())), name
        assert named <= set(declared), name
    assert "seuf_secret" not in SERVICES["worker-cpu"]["secrets"]
    assert [name for name, one in SERVICES.items() if "audit_key" in one.get("secrets", ())] == ["dispatcher"]


def test_the_script_makes_every_secret_once(tmp_path: Path) -> None:
    declared = compose(GIVEN)["secrets"]
    assert run("scripts/make-secrets", str(tmp_path / "s")).returncode == 0
    made = {path.name: path.read_text() for path in (tmp_path / "s").iterdir()}
    assert made.keys() == declared.keys()
    assert {Path(one["file"]).name for one in declared.values()} == made.keys()
    assert len(set(made.values())) == len(made)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    (tmp_path / "s" / "redis_password").unlink()
    assert run("scripts/make-secrets", str(tmp_path / "s")).returncode == 0
    again = {path.name: path.read_text() for path in (tmp_path / "s").iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"redis_password"}


def test_names_are_declared() -> None:
    whole = compose(GIVEN)
    for name, service in whole["services"].items():
        assert set(service["networks"]) <= set(whole["networks"]), name
        assert set(service.get("depends_on", {})) <= set(whole["services"]), name
        volumes = {volume.split(":")[0] for volume in service.get("volumes", [])}
        assert {volume for volume in volumes if "/" not in volume} <= set(whole["volumes"]), name
        for dependency, rule in service.get("depends_on", {}).items():
            other = whole["services"][dependency]
            if rule["condition"] == "service_healthy":
                assert "test" in other["healthcheck"], (
                    f"{name} waits for {dependency}, which has no health check"
                )
            else:
                assert rule["condition"] == "service_completed_successfully"
                assert other["restart"] == "no", f"{dependency} would never be completed"


def test_every_service_of_ours_is_locked_down() -> None:
    assert set(OURS) == {"migrate", "api", "dispatcher", "worker-cpu", "worker-gpu"}
    for name, service in OURS.items():
        assert service["build"]["target"] in STAGES, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["tmpfs"] == ["/tmp"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"], name


def test_every_service_has_limits_a_log_that_ends_and_a_health_check() -> None:
    for name, service in SERVICES.items():
        assert "mem_limit" in service, name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert "test" in service["healthcheck"] or name == "migrate", name


def test_only_what_speaks_to_the_outside_can() -> None:
    assert compose(GIVEN)["networks"]["backend"] == {"internal": True}
    reaching = [name for name, service in SERVICES.items() if set(service["networks"]) != {"backend"}]
    assert reaching == ["api", "dispatcher"]


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8321:8321"]}


def test_the_gpu_worker_differs_from_the_cpu_worker_only_by_its_device() -> None:
    cpu, gpu = (dict(SERVICES[name]) for name in ("worker-cpu", "worker-gpu"))
    devices = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert (cpu.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
    assert cpu == gpu


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_command_names_something_that_exists(name: str) -> None:
    command = OURS[name]["command"]
    if command[0] == "python":
        module = command[command.index("-m") + 1]
        assert importlib.util.find_spec(module), module
        return
    tool = Path(sys.executable).with_name(command[0])
    assert tool.exists(), f"{command[0]} is not installed by the lock"
    target = command[1] if command[0] == "uvicorn" else command[command.index("-A") + 1]
    helped = run(str(tool), "--help").stdout
    assert importlib.util.find_spec(target.split(":")[0]), target
    if command[0] == "celery":
        helped += run(str(tool), "worker", "--help").stdout
    for option in (part for part in command if part.startswith("--")):
        assert re.search(rf"{option}\b", helped), f"{command[0]} knows no {option}"


def test_the_commands_of_the_image_are_those_of_compose() -> None:
    assert json.loads(STAGES["api"].all("CMD")[0]) == SERVICES["api"]["command"]
    assert json.loads(STAGES["worker"].all("CMD")[0]) == SERVICES["worker-cpu"]["command"]


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_the_image_runs_as_somebody_and_has_a_health_check_without_curl(name: str) -> None:
    stage = STAGES[name]
    assert stage.parent == "base"
    assert stage.all("USER") == ["seuf"]
    assert "useradd" in STAGES["base"].all("RUN")[0]
    (check,) = stage.all("HEALTHCHECK")
    assert re.search(r'CMD \["(python|sh)", "-c", ', check)
    assert "curl" not in check


def test_every_stage_starts_from_one_that_exists() -> None:
    for stage in STAGES.values():
        assert stage.parent in STAGES or stage.parent == "${PYTHON_IMAGE}"
        for text in stage.all("COPY"):
            source = re.search(r"--from=(\S+)", text)
            assert source is None or source.group(1) in STAGES


def test_no_registry_is_built_in() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG TORCH_INDEX_URL$", text, re.MULTILINE), "the index of torch has no default"
    assert not re.search(r"https?://(?!127\.0\.0\.1)", text)


def ignored(path: str) -> bool:
    """Does .dockerignore keep `path` out of the build? The last line that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").replace("**/", "*")
            parents = [path, *(str(parent) for parent in Path(path).parents)]
            if any(fnmatch.fnmatch(each, pattern) for each in parents):
                out = not line.startswith("!")
    return out


def test_what_the_build_copies_exists_and_enters_the_context() -> None:
    copied = {
        source
        for stage in STAGES.values()
        for text in stage.all("COPY")
        if "--from" not in text
        for source in shlex.split(text)[:-1]
    }
    assert "seuf_core" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source), f".dockerignore keeps {source} out"
    assert ignored("tests/conftest.py")
    assert ignored(".git/config")
    assert ignored("seuf_core/__pycache__/errors.cpython-312.pyc")


def test_the_wheel_of_the_image_holds_every_package_and_the_migrations(tmp_path: Path) -> None:
    (build,) = (stage for stage in STAGES.values() if stage.name == "wheel")
    for text in build.all("COPY"):
        *sources, target = shlex.split(text)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "wheel"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    for package in packages:
        assert {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")} <= names
    assert {
        f"migrations/versions/{path.name}" for path in (ROOT / "migrations/versions").glob("*.py")
    } <= names


@pytest.mark.parametrize("image", ["edge", "engine"])
def test_the_requirements_of_an_image(image: str) -> None:
    result = run(sys.executable, "scripts/image_requirements.py", image)
    names = {re.split(r"[^\w-]", line)[0] for line in result.stdout.split("\n") if line}
    assert {"fastapi", "sqlalchemy", "celery", "psycopg", "redis", "tokenizers"} <= names
    assert ({"torch", "transformers", "safetensors", "peft"} & names == set()) == (image == "edge")
