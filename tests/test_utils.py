"""`utils`: the command line of every script, without torch."""

import argparse
import subprocess
import sys

import pytest
from conftest import ROOT
from loading import parse

from utils import number


def test_default_model(monkeypatch):
    monkeypatch.delenv("CHATGLM_MODEL", raising=False)
    assert parse().model == "THUDM/chatglm2-6b"
    monkeypatch.setenv("CHATGLM_MODEL", "my/folder")
    assert parse().model == "my/folder"


def test_number():
    convert = number(float, 0, 2)
    assert [convert(text) for text in ("0", "2", "1.5")] == [0, 2, 1.5]
    for text in ("-0.1", "2.1", "nan", "inf", "", "二"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a number from 0 t"):
            convert(text)


def run(program: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_needs_no_torch():
    program = "import sys, cli_demo; cli_demo.parse_args([]); print('torch' in sys.modules)"
    assert run(program).stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["api", "cli_demo"])
def test_unsupported_transformers(script):
    result = run(
        "import runpy, transformers; transformers.__version__ = '5.20.2'; "
        f"runpy.run_path('{script}.py', run_name='__main__')",
        *("--model", "resources/chatglm2-tiny"),
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "found 5.20.2: pip install" in result.stderr
