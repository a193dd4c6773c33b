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


def test_help_needs_no_torch():
    program = "import sys, cli_demo; cli_demo.parse_args([]); print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert result.stdout == b"False\n"
