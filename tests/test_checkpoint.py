"""`checkpoint`: folders, the hub, its cache and its disk."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from huggingface_hub import constants
from loading import fail, fail_to_load

from chatglm2 import checkpoint


def test_relative_path_below_the_repository(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = str(tiny_checkpoint.relative_to(ROOT))
    assert checkpoint.locate_checkpoint(name, None) == (tiny_checkpoint, None)
    with pytest.raises(ValueError, match=r"config\.json is a file: give the checkpoint folder"):
        checkpoint.locate_checkpoint(f"{name}/config.json", None)
    shutil.copytree(tiny_checkpoint, tmp_path / name)  # the current directory goes first
    assert checkpoint.locate_checkpoint(name, None) == (Path(name), None)


# The hub.


class Hub(BaseHTTPRequestHandler):
    """The requests to the hub that a download makes, for one repository: THUDM/chatglm2-6b."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        path = self.path.partition("?")[0]
        file = self.folder / Path(path).name
        headers, body = {"X-Repo-Commit": self.commit}, b"{}"
        if path in (f"/api/models/THUDM/chatglm2-6b{end}" for end in ("", "/revision/v1.0")):
            files = [{"rfilename": f.name, "size": f.stat().st_size} for f in self.folder.iterdir()]
            info = {"id": "THUDM/chatglm2-6b", "sha": self.commit, "siblings": files}
            status, body = 200, json.dumps(info).encode()
        elif path.startswith("/THUDM/chatglm2-6b/resolve/") and file.is_file():
            status, body = 200, file.read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            status = 404
            is_entry = "/resolve/" in path or "/tree/" in path
            headers["X-Error-Code"] = "EntryNotFound" if is_entry else "RepoNotFound"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub_url(tiny_checkpoint):
    handler = type("TinyHub", (Hub,), {"folder": tiny_checkpoint})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """A function that makes this process ask the given hub, with an empty cache."""

    def use(url: str, cache: Path = tmp_path):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    return use


@pytest.mark.slow
def test_download_and_the_copy_without_a_network(hub_url, use_hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path)}
    del environment["HF_HUB_OFFLINE"]
    program = "import sys, cli_demo; cli_demo.main(['--model', 'THUDM/chatglm2-6b', '-p', '你好'])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, timeout=99
    )
    assert result.returncode == 0, result.stderr.decode()
    assert "ChatGLM2-tiny" in result.stdout.decode()
    assert "downloading 0.0 GB into that folder" in result.stderr.decode()
    for url in (hub_url, "http://127.0.0.1:9"):  # once downloaded, nothing more is asked for
        use_hub(url, tmp_path / "hub")
        folder, hub_info = checkpoint.locate_checkpoint("THUDM/chatglm2-6b", None)
        assert hub_info is None and folder.name == Hub.commit
    (folder / "tokenizer.model").unlink()  # an interrupted download is no copy
    assert "no downloaded copy" in fail(checkpoint.locate_checkpoint, "THUDM/chatglm2-6b", None)


def test_hub_knows_the_revision(hub_url, use_hub):
    use_hub(hub_url)
    folder, hub_info = checkpoint.locate_checkpoint("THUDM/chatglm2-6b", "v1.0")
    assert folder is None and hub_info.sha == Hub.commit


@pytest.mark.parametrize(
    ("model", "url", "expected"),
    [
        ("nobody/nothing", "hub", "there is no such folder and no downloaded copy"),
        ("resources/chatglm3-tiny", "hub", "has no such model"),
        ("THUDM/chatglm2-6b", "http://127.0.0.1:9", "and http://127.0.0.1:9 does not provide it ("),
        ("THUDM/chatglm2-6b", None, "HF_HUB_OFFLINE"),
        ("./nothing", None, "there is no such folder"),
        ("/no/such/folder", None, "there is no such folder"),
        ("~/nothing/there", None, "there is no such folder"),
        ("a b", None, "there is no such folder"),
        ("..//", None, "is not a complete checkpoint: it has no config.json"),
    ],
)
def test_nothing_can_be_loaded(hub_url, use_hub, monkeypatch, tmp_path, model, url, expected):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if url:
        use_hub(url.replace("hub", hub_url))
    line = fail_to_load(model)
    assert line.startswith(model.removesuffix("//")) and expected in line
    assert "--model resources/chatglm2-tiny" in line and "HF_ENDPOINT" in line


@pytest.mark.parametrize("part", ["hub", "name server"])
def test_hub_that_never_answers(use_hub, monkeypatch, part):
    monkeypatch.setattr(checkpoint, "HUB_TIMEOUT_S", 0.5)
    released = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_hub(f"http://127.0.0.1:{server.getsockname()[1]}")
        if part == "name server":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: released.wait(60) and [])
            use_hub("http://hub.invalid")
        start = time.monotonic()
        assert "does not provide it" in fail_to_load("THUDM/chatglm2-6b")
        assert time.monotonic() - start < 5
    released.set()


def test_disk(monkeypatch, tmp_path):
    files = {"model.safetensors": 9e9, "pytorch_model.bin": 99e9, "tokenizer.model": 1e9}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    info = SimpleNamespace(siblings=siblings, sha=Hub.commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9.5e9))
    line = fail(checkpoint.check_disk, "me/model", info)
    assert "the download needs 10.0 GB, 9.5 GB free" in line and "HF_HOME" in line
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda *args, **kwargs: "/a/file")
    assert checkpoint.check_disk("me/model", info) == 0  # all of it is there
