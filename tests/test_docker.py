"""docker/: the files of an image are enough to serve; no image is built.

The services run here from a folder with the files that the Dockerfile copies, with its variables.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY
from servers import wait_until

DOCKER = ROOT / "docker"


def read_dockerfile() -> dict[str, list[str]]:
    """Return the arguments of the Dockerfile's instructions, by the instruction's name."""
    lines = (DOCKER / "Dockerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    instructions = {}
    for line in filter(None, text.splitlines()):
        name, _, arguments = line.partition(" ")
        instructions.setdefault(name, []).append(arguments.strip())
    return instructions


IMAGE = read_dockerfile()
VARIABLES = dict(word.split("=", 1) for line in IMAGE["ENV"] for word in shlex.split(line))


def read_service(name: str, file="compose.yaml", flags="") -> dict:
    """Return a service as Compose reads it with CHATGLM_FOLDER and CHATGLM_FLAGS set."""

    class Template(string.Template):
        braceidpattern = r"\w+(?::[-?][^}]*)?"

    values = {"CHATGLM_FOLDER": "/folder", "CHATGLM_FLAGS": flags}
    template = Template((DOCKER / file).read_text("utf-8"))
    names = {name: values.get(name.partition(":")[0], "") for name in template.get_identifiers()}
    return yaml.safe_load(template.substitute(names))["services"][name]


def copy_files(app: Path):
    """Copy what the image gets, and nothing that the build context leaves out."""
    shown = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    for line in IMAGE["COPY"]:
        *sources, target = line.split()
        for source in sources:
            assert f"!{source}" in shown
            for path in ROOT.glob(source):
                copy = app / (path.name if target == "./" else target)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)


def test_the_dockerfile_finds_the_version_of_torch():
    pinned = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert sum(line.startswith("torch==") for line in pinned) == 1


def test_what_is_written_is_in_the_cache():
    assert int(IMAGE["USER"][0]) > 0  # not root
    written = ("HOME", "CHATGLM_CACHE", "HF_HOME", "TRITON_CACHE_DIR")
    assert all(Path(VARIABLES[name]).is_relative_to("/cache") for name in written)


@pytest.mark.parametrize("name", ["api", "web"])
def test_services_reach_no_further_than_they_must(name):
    service = read_service(name)
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
    model, cache = service["volumes"]
    assert model["source"] == "/folder" and model["read_only"]
    assert model["target"] == VARIABLES["CHATGLM_MODEL"]
    assert cache["target"] == VARIABLES["HOME"]
    host, published, inner = service["ports"][0].split(":")
    assert (host, published) == ("127.0.0.1", inner)
    address = {**VARIABLES, **service["environment"]}["HEALTH_URL"]
    assert address.startswith(f"http://127.0.0.1:{inner}/")
    gpu = read_service(name, "compose.cuda.yaml")
    assert gpu["build"]["args"] == {"VARIANT": "cuda"} and gpu["image"] != service["image"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def start_service(name: str, flags: str, folder: Path, port: int) -> tuple[list[str], dict]:
    """Return the command and the variables of a container, with /cache in another folder."""
    service = read_service(name, flags=flags)
    address = f"http://127.0.0.1:{port}/" + ("health" if name == "api" else "")
    variables = {**VARIABLES, **service["environment"], "HEALTH_URL": address}
    cache = str(folder / "cache")
    variables = {key: (value or "").replace("/cache", cache) for key, value in variables.items()}
    variables |= {"CHATGLM_MODEL": str(TINY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"PATH": os.environ["PATH"], "http_proxy": "http://127.0.0.1:9"}  # not to be used
    command = [sys.executable, *shlex.split(service["command"]), "--port", str(port)]
    return command, variables


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"), [("api", "--quantize 4 --threads 1"), ("web", "--threads 1")]
)
def test_the_copied_files_serve_and_the_health_check_sees_it(name, flags, tmp_path):
    copy_files(tmp_path / "app")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, variables = start_service(name, flags, tmp_path, port)
    if name == "api":
        assert command[1:4] == json.loads(IMAGE["CMD"][0])[:3]
    program, *check = json.loads(IMAGE["HEALTHCHECK"][0].partition("CMD")[2])
    assert program == "python"

    def is_healthy() -> bool:
        done = subprocess.run([sys.executable, *check], env=variables, capture_output=True)
        return done.returncode == 0

    assert not is_healthy()
    process = subprocess.Popen(command, cwd=tmp_path / "app", env=variables)
    try:
        wait_until(lambda: process.poll() is not None or is_healthy())
        assert process.poll() is None, "the script has ended"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) is not None
    finally:
        process.kill()
        process.wait()
    assert not is_healthy()
    if "--quantize" in flags and shutil.which("cc"):
        assert list((tmp_path / "cache" / "kernels").iterdir())
