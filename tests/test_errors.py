"""`errors`: any failure while loading ends a script with one line."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from loading import fail, fail_to_load, load

from chatglm2 import errors, loading


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("rope"), "KeyError: 'rope' (CHATGLM_TRACEBACK=1 shows the traceback)"),
        (MemoryError(), "MemoryError (CHATGLM_TRACEBACK=1 shows the traceback)"),
        (torch.OutOfMemoryError("CUDA\nout of"), "OutOfMemoryError: CUDA out of ("),
        (ValueError("a library\x1b[31m"), "ValueError: a library\N{REPLACEMENT CHARACTER}[31m ("),
    ],
)
def test_any_error_while_loading(tiny_checkpoint, monkeypatch, error, line):
    def break_down(*args, **kwargs):
        raise error

    monkeypatch.setattr(loading, "read_config", break_down)
    monkeypatch.delenv("CHATGLM_TRACEBACK", raising=False)
    assert fail_to_load(tiny_checkpoint).startswith(f"{tiny_checkpoint}: {line}")
    monkeypatch.setenv("CHATGLM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        load(tiny_checkpoint)


def test_own_errors_are_printed_as_they_are(tmp_path):
    def read():
        with errors.exit_on_error("--adapter "):
            loading.read_adapter(tmp_path / "none", None, False)

    assert fail(read) == f"--adapter {tmp_path / 'none'}: there is no such folder."


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("module", ["export", "refresh"])
def test_a_result_that_cannot_be_printed(tiny_checkpoint, tmp_path, module):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    more = [str(tmp_path / "new")] if module == "export" else []
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", f"chatglm2.{module}", str(folder), *more],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr.endswith("The output cannot be written: No space left on device.\n")
    assert "Traceback" not in result.stderr


def test_a_folder_is_named_once(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "folder")
    (folder / "config.json").write_text("[]")
    assert fail_to_load(folder).startswith(f"{folder}/config.json holds no JSON object")
