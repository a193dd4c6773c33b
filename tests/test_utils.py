"""`utils`: the command line of every script, without torch."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from loading import parse

import utils
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
    ("module", "end"),
    [
        ("torch.nn", "requirements.txt"),
        ("prometheus_client", "requirements.txt"),
        ("yaml", "requirements-dev.txt"),
        ("chatterbot_corpus", "requirements-dev.txt"),
        ("nowhere", "pip install nowhere"),
    ],
)
def test_missing_library(module, end):
    result = run(
        "import sys, utils; sys.modules[sys.argv[1]] = None; __import__(sys.argv[1])", module
    )
    [line] = result.stderr.splitlines()
    assert f"{module.partition('.')[0]} is missing: pip install " in line and line.endswith(end)


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("evaluation/load_test.py", "aiohttp"),
        ("resources/make_pictures.py", "pexpect"),
        ("resources/chatglm2-tiny/training/check.py", "yaml"),
        ("resources/chatglm2-tiny/training/train.py", "yaml"),
    ],
)
def test_scripts_that_need_more_libraries(script, module):
    program = (
        f"import sys, runpy; sys.modules[{module!r}] = sys.modules['torch'] = None;"
        f"sys.path.insert(0, {str(Path(script).parent)!r}); runpy.run_path({script!r})"
    )
    [line] = run(program).stderr.splitlines()
    assert "is missing: pip install -r " in line


def test_fine_tuning_without_its_libraries():
    program = "import sys, runpy; sys.modules['jieba'] = None; sys.path.insert(0, 'ptuning');"
    [line] = run(f"{program} runpy.run_path('ptuning/main.py')").stderr.splitlines()
    assert line.endswith(
        "jieba is missing: pip install -r " + str(ROOT / "ptuning/requirements.txt")
    )


@pytest.mark.parametrize("script", ["api", "cli_demo", "openai_api", "web_demo"])
def test_flags_are_read_before_the_imports(script):
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['fastapi'] = None;"
        f"runpy.run_path('{script}.py', run_name='__main__')"
    )
    assert "--threads N" in run(program, "--help").stdout
    result = run(program, "--modle", "x")
    assert result.returncode == 2 and "--modle x" in result.stderr.splitlines()[-1]


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
    # A program that is started in the background ignores Ctrl-C.
    program = (
        "import os, signal, sys, utils; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"utils.run_script(lambda: ({main}))"
    )
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


# Logins of the page.


@pytest.fixture
def parse_login():
    parser = argparse.ArgumentParser()
    utils.add_page_arguments(parser)
    return lambda *flags: parser.parse_args(flags).auth


def test_users_and_passwords(parse_login, tmp_path):
    assert parse_login() is None
    assert parse_login("--auth", "ann:a:b c") == [("ann", "a:b c")]
    file = tmp_path / "logins"
    file.write_text("\ufeffann:secret\r\n\nbob:密码\n", "utf-8")
    several = [("ann", "secret"), ("bob", "密码")]
    assert parse_login("--auth", f"@{file}") == several
    assert parse_login("--auth", "eve:x", "--auth", f"@{file}") == [("eve", "x"), *several]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "must be USER:PASSWORD"),
        (b"ann:secret\nbob", "must be USER:PASSWORD"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used(content, message, parse_login, tmp_path, capsys):
    file = tmp_path / "logins"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        parse_login("--auth", f"@{file}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in error and message in error


@pytest.mark.parametrize("value", ["", "ann", "ann:", ":secret"])
def test_a_value_that_cannot_be_used(value, parse_login, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_login("--auth", value)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--auth: it must be USER:PASSWORD" in error
    assert value in ("", "ann") or value not in error  # no password in the terminal's history


def test_logins_from_a_pipe():
    """The command line is parsed before the imports and in `main`, and the pipe is read once."""
    program = (
        "import utils; parse = lambda: utils.parse_args('', utils.add_page_arguments);"
        "print(parse().auth, parse().auth)"
    )
    command = '"$0" -c "$1" --auth @<(echo ann:secret)'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "[('ann', 'secret')] [('ann', 'secret')]\n", result.stderr
