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


@pytest.mark.parametrize(
    ("module", "file"), [("torch.nn", "requirements.txt"), ("yaml", "requirements-dev.txt")]
)
def test_missing_library(module, file):
    program = "import sys, utils; sys.modules[sys.argv[1]] = None; __import__(sys.argv[1])"
    result = run(program, module)
    [line] = result.stderr.splitlines()
    name = module.partition(".")[0]
    assert f"{name} is missing: pip install -r" in line and line.endswith(file)


CLOSED = "stdout is closed: what is printed there is lost.\n"
FULL = "OSError: [Errno 28] No space left on device (CHATGLM_TRACEBACK=1 shows the traceback)\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(
    ("main", "streams", "code", "printed"),
    [
        ("print(sys.stdin.read())", "<&-", 0, ""),
        ("print(1)", ">&-", 0, CLOSED),
        ("print(1, file=sys.stderr)", "2>&-", 0, ""),
        ("print(sys.stdin.read())", "<&- >&- 2>&-", 0, ""),
        ("print(1)", ">/dev/full", 1, FULL),
        ("print(1, flush=True)", ">/dev/full", 1, FULL),
        ("print(1), sys.exit('wrong')", "", 1, "wrong\n"),
        ("[print('line') for _ in range(99999)]", "| head -1", 1, ""),
        ("open('/none')", "", 1, "FileNotFoundError: [Errno 2] No such file or directory: '/none'"),
        ("os.kill(os.getpid(), 2)", "", 130, ""),
    ],
)
def test_end_of_a_script(main, streams, code, printed):
    """Closed streams, a full disk and Ctrl-C end a script without a traceback."""
    program = f"import os, sys, utils; utils.run_script(lambda: ({main}))"
    command = f'set -o pipefail; "$0" -c "$1" {streams}'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == code and result.stderr.startswith(printed)
    assert len(result.stderr.splitlines()) <= 1


def test_more_threads_than_a_process_can_have(capsys):
    for count in ("100000", "2147483648", "9" * 5000):
        with pytest.raises(SystemExit):
            parse("--threads", count)
        assert f"{count!r} is not an integer from 1 to " in capsys.readouterr().err
    assert parse("--threads", "64").threads == 64
