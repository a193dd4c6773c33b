"""docker/: what an image would hold is enough to serve, and not as root; no image is made.

The services run here from a folder with the files that the Dockerfile copies, in its environment.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from servers import wait_until

DOCKER = ROOT / "docker"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions: their name and the rest."""
    lines = (DOCKER / "Dockerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if line and not line.startswith("#"))
    return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines()]


def values(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for rest in values("ENV") for word in shlex.split(rest))


def read_compose(name="compose.yaml", **variables) -> dict:
    """Return the file as Compose reads it, with `variables` in place of those of the shell."""
    text = re.sub(
        r"\$\{(\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}",
        lambda match: variables.get(match[1], match["rest"] if match["kind"] == "-" else ""),
        (DOCKER / name).read_text("utf-8"),
    )
    return yaml.safe_load(text)


def copied_files() -> dict[Path, str]:
    """Return the files that the image gets, each with its name below /app."""
    files = {}
    for rest in values("COPY"):
        *sources, target = rest.split()
        for source in sources:
            found = sorted(ROOT.glob(source))
            assert found, f"COPY {source} finds nothing"
            for path in found:
                name = path.name if target == "./" else target
                for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
                    if "__pycache__" not in file.parts:
                        files[file] = str(Path(name, file.relative_to(path)))
    return files


def test_the_context_holds_just_what_is_copied():
    lines = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    sources = [source for rest in values("COPY") for source in rest.split()[:-1]]
    assert sorted(rules[1:-1]) == sorted(f"!{source}" for source in sources)


def test_images_are_named_with_versions_and_packages_are_pinned():
    stages = [rest.split()[0] for rest in values("FROM")]
    assert stages.pop() == "base-${VARIANT}"
    assert {f"base-{variant}" for variant in ("cpu", "cuda")} == {
        rest.split()[-1] for rest in values("FROM")[:-1]
    }
    for image in stages:
        assert re.fullmatch(r"[\w/]+:\d+\.[\w.-]+", image), image
    pinned = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line]
    assert all(re.match(r"[\w-]+==\d", line) for line in pinned)
    assert sum(line.startswith("torch==") for line in pinned) == 1  # the Dockerfile looks for it


def test_nothing_runs_as_root_and_what_is_written_is_in_the_cache():
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("CMD")
    (user,) = values("USER")
    assert int(user) > 0 and f"--uid {user} " in " ".join(values("RUN"))
    written = ("HOME", "CHATGLM_CACHE", "HF_HOME", "TRITON_CACHE_DIR")
    assert all(Path(image_environment()[name]).is_relative_to("/cache") for name in written)


@pytest.mark.parametrize("name", ["api", "web"])
def test_services_reach_no_further_than_they_must(name):
    service = read_compose(CHATGLM_FOLDER="/folder")["services"][name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
    model, cache = service["volumes"]
    assert model["source"] == "/folder" and model["read_only"]
    assert model["target"] == image_environment()["CHATGLM_MODEL"]
    assert cache["target"] == image_environment()["HOME"]
    (port,) = service["ports"]
    host, published, inner = port.split(":")
    assert host == "127.0.0.1"
    address = {**image_environment(), **service["environment"]}["HEALTH_URL"]
    assert re.match(r"http://127\.0\.0\.1:(\d+)/", address)[1] == inner == published


def test_the_gpu_variant_changes_the_image_and_adds_gpus():
    services = read_compose()["services"]
    changes = read_compose("compose.cuda.yaml")["services"]
    assert changes.keys() == services.keys()
    for name, change in changes.items():
        assert change.keys() == {"image", "build", "deploy"}
        assert change["image"] != services[name]["image"]
        assert change["build"]["args"] == {"VARIANT": "cuda"}
        assert services[name]["build"]["args"]["VARIANT"] == "cpu"
        (device,) = change["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def build_environment(tmp_path: Path, checkpoint: Path, service: dict) -> dict[str, str]:
    """Return the variables of a container, with /cache and the model in other places."""
    inner = {**image_environment(), **service["environment"]}
    del inner["PATH"]
    folder = str(tmp_path / "cache")
    inner = {name: (value or "").replace("/cache", folder) for name, value in inner.items()}
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | inner | threads | {"CHATGLM_MODEL": str(checkpoint)}


@contextmanager
def run_service(app: Path, words: list[str], environment: dict[str, str]):
    process = subprocess.Popen([sys.executable, *words], cwd=app, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "flags"), [("api", "--quantize 4 --threads 1"), ("web", "--threads 1")]
)
def test_the_copied_files_serve_and_the_health_check_sees_it(
    name, flags, tmp_path, tiny_checkpoint
):
    for source, target in copied_files().items():
        (tmp_path / "app" / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "app" / target)
    service = read_compose(CHATGLM_FLAGS=flags)["services"][name]
    words = shlex.split(service["command"])
    if name == "api":
        assert words[:3] == json.loads(values("CMD")[0])
    environment = build_environment(tmp_path, tiny_checkpoint, service)
    port = find_free_port()
    environment["HEALTH_URL"] = re.sub(r":\d+/", f":{port}/", environment["HEALTH_URL"])
    environment["http_proxy"] = "http://127.0.0.1:9"  # the health check asks no proxy
    program, *check = json.loads(values("HEALTHCHECK")[0].partition("CMD")[2])
    assert program == "python"

    def is_healthy() -> bool:
        done = subprocess.run([sys.executable, *check], env=environment, capture_output=True)
        return done.returncode == 0

    assert not is_healthy()
    with run_service(tmp_path / "app", [*words, "--port", str(port)], environment) as process:
        wait_until(lambda: process.poll() is not None or is_healthy())
        assert process.poll() is None, "the script has ended"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) is not None
    assert not is_healthy()
    if "--quantize" in flags and shutil.which("cc"):
        assert list((tmp_path / "cache" / "kernels").iterdir())
