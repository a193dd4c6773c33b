"""`cli_demo.py` with a fake model, with the bundled checkpoint, in real terminals and in pipes."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import cli_demo
from chatglm2 import CHAT_DEFAULTS
from chatglm2.chat.conversation import Conversation

TIMEOUT_S = 90
needs_terminal = pytest.mark.skipif(os.name == "nt", reason="needs a Unix terminal")


class EchoModel:
    """Answers with the question in angle brackets, a character at a time."""

    def __init__(self, seq_length=1000):
        self.config = SimpleNamespace(seq_length=seq_length)
        self.calls = []

    def stream_chat(self, tokenizer, query, history, past_key_values, **settings):
        self.calls.append({"query": query, "history": list(history), **settings})
        answer = f"<{query}>"
        for length in range(1, len(answer) + 1):
            new_history = [*history, (query, answer[:length])]
            yield answer[:length], new_history, past_key_values


def read_settings(*argv) -> dict:
    return cli_demo.read_settings(cli_demo.parse_args(argv))


class More(str):
    """A line of a question of several lines, after the first one."""


@pytest.fixture
def converse(monkeypatch, tiny_tokenizer, capsys):
    """A function that types lines and returns what is printed; exceptions are raised instead."""

    def type_lines(model, *lines, flags=()):
        remaining = [*lines, EOFError]

        def read(prompt):
            line = remaining.pop(0)
            assert prompt == "... " if isinstance(line, More) else "\n用户："
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        cli_demo.chat_loop(Conversation(model, tiny_tokenizer), read_settings(*flags))
        return capsys.readouterr()

    return type_lines


# Arguments.


def test_defaults_are_those_of_chat(capsys):
    """Flags that are not given are not passed on; `--help` shows what chat then uses."""
    assert read_settings() == {}
    settings = {"temperature": 0, "prompt_lookup_num_tokens": 3}
    assert read_settings("--temperature", "0", "--prompt-lookup", "3") == settings
    with pytest.raises(SystemExit):
        cli_demo.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.partition("conversation:")[2].split())
    for flag, name in (("max-length", "max_length"), ("top-p", "top_p"), ("temperature",) * 2):
        shown = re.search(rf"--{flag} .*?\(default: (.*?)\)", text)
        assert float(shown[1]) == CHAT_DEFAULTS[name]


@pytest.mark.parametrize(
    "argv",
    [
        ["--top-p", "1.5"],
        ["--top-p", "nan"],
        ["--temperature", "-1"],
        ["--temperature", "warm"],
        ["--max-length", "0"],
        ["--seed", "-1"],
        ["--threads", "0"],
        ["--dtype", "int3"],
        ["--quantize", "3"],
        ["--prompt-lookup", "0"],
        ["--prompt-lookup", "10"],  # the temperature is not 0
        ["--prompt", ""],
        ["-p", " \n"],
    ],
)
def test_value_out_of_range(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli_demo.parse_args(argv)
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert argv[0] in line and argv[1].strip() in line


# The loop, with a fake model.


def test_terminal_conversation(converse):
    model = EchoModel()
    flags = ["--top-p", "0.5", "--temperature", "0"]
    out, _ = converse(model, "你好", "  ", "again", flags=flags)
    assert out == f"{cli_demo.WELCOME}\n\nChatGLM：<你好>\n\nChatGLM：<again>\n\n"
    first, second = model.calls
    assert (first["query"], first["top_p"], first["temperature"]) == ("你好", 0.5, 0)
    assert (second["query"], second["history"]) == ("again", [("你好", "<你好>")])


def test_clear_and_stop(converse):
    model = EchoModel()
    out, _ = converse(model, "你好", "clear", "again", " stop ", "more")
    assert [call["query"] for call in model.calls] == ["你好", "again"]
    assert model.calls[1]["history"] == []
    assert out.count(cli_demo.WELCOME) == 2
    assert "\033" not in out  # the output is no terminal: nothing clears its screen


@pytest.mark.parametrize("word", ["exit", " quit "])
def test_help_and_other_words_to_leave(converse, tiny_tokenizer, word, monkeypatch):
    model = EchoModel()
    out, _ = converse(model, "help", word, "more")
    assert cli_demo.HELP in out and not model.calls
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"help\n{word}"))
    cli_demo.chat_loop(Conversation(model, tiny_tokenizer), {})  # in a pipe they are questions
    assert [call["query"] for call in model.calls] == ["help", word]


def test_question_of_several_lines(converse):
    model = EchoModel()
    lines = ['"""', More("one"), More("  clear"), More('"""')]
    converse(model, *lines, lines[0], lines[1], KeyboardInterrupt, "last")
    assert [call["query"] for call in model.calls] == ["one\n  clear", "last"]


def test_ctrl_c_at_the_prompt(converse):
    model = EchoModel()
    _, err = converse(model, "one", KeyboardInterrupt, "two")
    assert [call["query"] for call in model.calls] == ["one", "two"] and "Ctrl-D" in err


def test_ctrl_c_in_an_answer(converse):
    class Interrupted(EchoModel):
        def stream_chat(self, *args, **kwargs):
            for step in super().stream_chat(*args, **kwargs):
                if step[0] == "<一二":
                    signal.raise_signal(signal.SIGINT)
                yield step

    model, handler = Interrupted(), signal.getsignal(signal.SIGINT)
    out, err = converse(model, "一二三四", "下一个")
    assert "ChatGLM：<一二\n" in out and "ChatGLM：<下一个>\n" in out and "已停止" in err
    assert model.calls[1]["history"] == [("一二三四", "<一二")]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_filled_placeholder_is_printed_anew(converse):
    class Placeholder(EchoModel):
        def stream_chat(self, tokenizer, query, history, past_key_values, **kwargs):
            for answer in ("今天", "今天[[训练时间", "今天2023年", "今天2023年。"):
                yield answer, [(query, answer)], past_key_values

    assert "ChatGLM：今天[[训练时间\n今天2023年。\n" in converse(Placeholder(), "日期").out


def test_pipe(monkeypatch, tiny_tokenizer, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\r\ntwo\r\nclear\nthree"))
    model = EchoModel()
    cli_demo.chat_loop(Conversation(model, tiny_tokenizer), {})
    assert capsys.readouterr().out == "<one>\n<two>\n<three>\n"
    assert [len(call["history"]) for call in model.calls] == [0, 1, 0]


def test_oldest_rounds_are_dropped_with_a_notice(converse):
    model = EchoModel(seq_length=2048)
    questions = [f"question {i}" for i in range(12)]
    assert "rounds are dropped" in converse(model, *questions, flags=["--max-length", "160"]).err
    last = model.calls[-1]["history"]
    assert 0 < len(last) < 11 and last[-1] == ("question 10", "<question 10>")
    assert all(len(call["prompt"][0]) <= 120 for call in model.calls)


def test_too_long_a_question_keeps_the_conversation(converse):
    model = EchoModel()
    _, err = converse(model, "你好", "很长" * 500, "再见", flags=["--max-length", "200"])
    assert len(err.splitlines()) == 1 and "at most 150 fit" in err
    assert [call["query"] for call in model.calls] == ["你好", "再见"]
    assert model.calls[1]["history"] == [("你好", "<你好>")]


def test_an_answer_that_is_cut(converse, tiny_model):
    flags = ["--max-length", "40", "--temperature", "0"]
    assert "已截断" in converse(tiny_model, "讲个故事", flags=flags).err


def test_prompt_and_seed(tiny_checkpoint, capsys, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    cli_demo.main(["--model", str(tiny_checkpoint), "-p", "你好", "--seed", "7"])
    assert seeds == [7] and capsys.readouterr().out.count("\n") == 1


# Real terminals and pipes; each start takes seconds, so each session tests much.


def environment(**changes) -> dict[str, str]:
    """This process' environment with one thread, in any locale but the one asked for."""
    names = ("CHATGLM_MODEL", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture
def slow_command(tiny_checkpoint, tmp_path) -> list[str]:
    """The script with `SlowModel`, which answers "echo X" with X and a story slowly."""
    launcher = [sys.executable, str(ROOT / "tests" / "page_models.py"), str(tmp_path / "notes")]
    return [*launcher, str(ROOT / "cli_demo.py"), "--model", str(tiny_checkpoint)]


@pytest.mark.slow
@needs_terminal
def test_session_in_a_terminal(slow_command):
    pexpect = pytest.importorskip("pexpect")
    command, *args = slow_command
    env = environment(LC_ALL="C.UTF-8", TERM="xterm")
    options = {"env": env, "dimensions": (24, 80), "timeout": TIMEOUT_S}
    session = pexpect.spawn(command, args, encoding="utf-8", **options)
    session.expect("正在启动")
    session.expect("欢迎使用 ChatGLM2-6B 模型.*clear 清空对话历史，stop 终止程序.*用户：")
    for query, expected in (
        ("忘记我吧", "ChatGLM：.*用户："),
        ("clear", r"\x1b\[2J.*欢迎使用.*用户："),
        ("echo 你好世界\x7f\x7f", "ChatGLM：你好\r\n.*用户："),
        ("echo Hello\x1b[D\x1b[D\x1b[Da", "ChatGLM：Heallo\r\n.*用户："),  # three times left
        ("\x1b[200~echo 1\rclear\r\r  3\x1b[201~", "ChatGLM：1\r\nclear\r\n\r\n  3\r\n.*用户："),
        ('"""\recho 1\r2\r"""', "ChatGLM：1\r\n2\r\n.*用户："),
        ("讲个故事", "ChatGLM：."),
    ):
        session.sendline(query)
        session.expect(expected)
    session.sendintr()
    session.expect("已停止.*用户：")
    session.sendintr()
    session.expect("Ctrl-D.*用户：")
    session.sendeof()
    session.expect(pexpect.EOF)
    session.close()
    assert session.exitstatus == 0


@pytest.mark.slow
@needs_terminal
def test_ctrl_c_while_starting():
    pexpect = pytest.importorskip("pexpect")
    program = [str(ROOT / "cli_demo.py"), "--model", "resources/chatglm2-tiny"]
    session = pexpect.spawn(sys.executable, program, encoding="utf-8", timeout=TIMEOUT_S)
    session.expect("starting.*\r\n")
    session.sendintr()
    session.expect(pexpect.EOF)
    session.close()
    assert session.before.strip() in ("", "^C") and session.signalstatus == signal.SIGINT


@pytest.mark.slow
@needs_terminal
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, which knows the screen")
def test_backspace_on_the_screen_without_a_locale(slow_command, tmp_path):
    tmux = ["tmux", "-u", "-S", str(tmp_path / "socket"), "-f", os.devnull]

    def run(*args) -> str:
        result = subprocess.run([*tmux, *args], env=environment(), capture_output=True, check=True)
        return result.stdout.decode()

    def wait_for(text: str):
        deadline = time.monotonic() + TIMEOUT_S
        while text not in (screen := run("capture-pane", "-p")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)

    command = ["env", "LC_ALL=C", *slow_command]
    run("new-session", "-d", "-x", "80", "-y", "24", *command, ";", "set", "remain-on-exit", "on")
    try:
        wait_for("用户：")
        for keys, expected in (
            (["-l", "echo 你好世界"], "用户：echo 你好世界\n"),
            (["BSpace", "BSpace"], "用户：echo 你好\n"),
            (["-l", "北"], "用户：echo 你好北\n"),
            (["Left"], "用户：echo 你好北\n"),
            (["-l", "东"], "用户：echo 你好东北\n"),
            (["Enter"], "ChatGLM：你好东北\n"),
        ):
            run("send-keys", *keys)
            wait_for(expected)
    finally:
        run("kill-server")


def run_script(*argv, **kwargs):
    command = [sys.executable, str(ROOT / "cli_demo.py"), *argv]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, **kwargs)


@pytest.mark.slow
def test_pipe_without_a_locale(tiny_checkpoint, tmp_path):
    result = run_script(
        *("--model", str(tiny_checkpoint), "--temperature", "0"),
        input="你好\n\nclear\n你好\n".encode() + b"\xff\xfe\n",
        cwd=tmp_path,
        env=environment(LC_ALL="C", PYTHONUTF8="0"),
    )
    assert result.returncode == 0, result.stderr
    first, second, _ = result.stdout.decode("utf-8").splitlines()
    assert "ChatGLM2-tiny" in first and first == second


@pytest.mark.slow
def test_prompt_argument_in_another_locale(tiny_checkpoint, tmp_path):
    """The folder is given by CHATGLM_MODEL, relative to the repository."""
    model = str(tiny_checkpoint.relative_to(ROOT))
    result = run_script(
        *("-p", "你好", "--seed", "1", "--dtype", "bfloat16", "--quantize", "4"),
        cwd=tmp_path,
        env=environment(LC_ALL="C", PYTHONUTF8="0", CHATGLM_MODEL=model),
    )
    assert result.returncode == 0, result.stderr
    [answer] = result.stdout.decode("utf-8").splitlines()
    assert "ChatGLM2-tiny" in answer
    assert b"bfloat16 with INT4 weights: " in result.stderr


@pytest.mark.slow
def test_no_network_and_the_default_model(tmp_path):
    env = environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    result = run_script(cwd=tmp_path, env=env, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (1, b"")
    [line] = result.stderr.decode("utf-8").splitlines()
    assert line.startswith("THUDM/chatglm2-6b: ") and "--model resources/chatglm2-tiny" in line
