"""`cli_demo.py` with a fake model, with the bundled checkpoint, in real terminals and in pipes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli_demo
from chatglm2 import CHAT_DEFAULTS
from chatglm2.chat.conversation import Conversation

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "cli_demo.py"
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


def run_loop(model, tokenizer, *argv):
    cli_demo.chat_loop(Conversation(model, tokenizer), read_settings(*argv))


@pytest.fixture
def terminal(monkeypatch):
    """A function that types lines; an exception in the list is raised instead."""

    def type_lines(*lines):
        remaining = [*lines, EOFError]

        def read(prompt):
            assert prompt == "\n用户："
            line = remaining.pop(0)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

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
    ],
)
def test_value_out_of_range(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli_demo.parse_args(argv)
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert argv[0] in line and argv[1] in line


# The loop, with a fake model.


def test_terminal_conversation(terminal, tiny_tokenizer, capsys):
    terminal("你好", "  ", "again")
    model = EchoModel()
    run_loop(model, tiny_tokenizer, "--top-p", "0.5", "--temperature", "0")
    out = capsys.readouterr().out
    assert out == f"{cli_demo.WELCOME}\n\nChatGLM：<你好>\n\nChatGLM：<again>\n\n"
    assert [call["query"] for call in model.calls] == ["你好", "again"]
    assert model.calls[1]["history"] == [("你好", "<你好>")]
    assert (model.calls[0]["top_p"], model.calls[0]["temperature"]) == (0.5, 0)


def test_clear_and_stop(terminal, tiny_tokenizer, capsys):
    terminal("你好", "clear", "again", " stop ", "more")
    model = EchoModel()
    run_loop(model, tiny_tokenizer)
    assert [call["query"] for call in model.calls] == ["你好", "again"]
    assert model.calls[1]["history"] == []
    out = capsys.readouterr().out
    assert out.count(cli_demo.WELCOME) == 2
    assert "\033" not in out  # the output is no terminal: nothing clears its screen


def test_ctrl_c_at_the_prompt(terminal, tiny_tokenizer, capsys):
    terminal("one", KeyboardInterrupt, "two")
    model = EchoModel()
    run_loop(model, tiny_tokenizer)
    assert [call["query"] for call in model.calls] == ["one", "two"]
    assert "Ctrl-D" in capsys.readouterr().err


def test_ctrl_c_in_an_answer(terminal, tiny_tokenizer, capsys):
    class Interrupted(EchoModel):
        def stream_chat(self, tokenizer, query, *args, **kwargs):
            for step in super().stream_chat(tokenizer, query, *args, **kwargs):
                if step[0] == "<一二":
                    signal.raise_signal(signal.SIGINT)
                yield step

    terminal("一二三四", "下一个")
    model = Interrupted()
    handler = signal.getsignal(signal.SIGINT)
    run_loop(model, tiny_tokenizer)
    captured = capsys.readouterr()
    assert "ChatGLM：<一二\n" in captured.out and "ChatGLM：<下一个>\n" in captured.out
    assert "已停止" in captured.err
    assert model.calls[1]["history"] == [("一二三四", "<一二")]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_filled_placeholder_is_printed_anew(terminal, tiny_tokenizer, capsys):
    class Placeholder(EchoModel):
        def stream_chat(self, tokenizer, query, history, past_key_values, **kwargs):
            for answer in ("今天", "今天[[训练时间", "今天2023年", "今天2023年。"):
                yield answer, [(query, answer)], past_key_values

    terminal("日期")
    run_loop(Placeholder(), tiny_tokenizer)
    assert "ChatGLM：今天[[训练时间\n今天2023年。\n" in capsys.readouterr().out


def test_pipe(monkeypatch, tiny_tokenizer, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\r\ntwo\r\nclear\nthree"))
    model = EchoModel()
    run_loop(model, tiny_tokenizer)
    assert capsys.readouterr().out == "<one>\n<two>\n<three>\n"
    assert [len(call["history"]) for call in model.calls] == [0, 1, 0]


def test_oldest_rounds_are_dropped_with_a_notice(terminal, tiny_tokenizer, capsys):
    terminal(*(f"question {i}" for i in range(12)))
    model = EchoModel(seq_length=2048)
    run_loop(model, tiny_tokenizer, "--max-length", "160")
    assert "rounds are dropped" in capsys.readouterr().err
    last = model.calls[-1]
    assert 0 < len(last["history"]) < 11
    assert last["history"][-1] == ("question 10", "<question 10>")
    for call in model.calls:
        assert len(call["prompt"][0]) <= 120 and call["max_length"] == 160


def test_too_long_a_question_keeps_the_conversation(terminal, tiny_tokenizer, capsys):
    terminal("你好", "很长" * 500, "再见")
    model = EchoModel()
    run_loop(model, tiny_tokenizer, "--max-length", "200")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "at most 150 fit" in lines[0]
    assert [call["query"] for call in model.calls] == ["你好", "再见"]
    assert model.calls[1]["history"] == [("你好", "<你好>")]


# The bundled checkpoint, in this process.


def start_conversation(model, tokenizer, *argv):
    """Return a function that asks and returns the answer, and the conversation."""
    settings = read_settings("--temperature", "0", *argv)
    conversation = Conversation(model, tokenizer)

    def ask(query: str, stop=None) -> str:
        answers = cli_demo.start_answer(conversation, query, settings)
        cli_demo.print_answer(conversation, answers, stop or threading.Event())
        return conversation.history[-1][1]

    return ask, conversation


def test_a_stopped_answer_is_kept(tiny_model, tiny_tokenizer, capsys):
    ask, _ = start_conversation(tiny_model, tiny_tokenizer)
    whole = ask("讲个故事")
    ask, conversation = start_conversation(tiny_model, tiny_tokenizer)
    stop = threading.Event()
    stop.set()
    partial = ask("讲个故事", stop)
    assert partial and whole.startswith(partial) and len(partial) < len(whole)
    assert conversation.cache.history == conversation.history == [("讲个故事", partial)]
    ask("你好")
    assert [query for query, _ in conversation.history] == ["讲个故事", "你好"]


def test_an_answer_that_is_cut(tiny_model, tiny_tokenizer, capsys):
    ask, conversation = start_conversation(tiny_model, tiny_tokenizer, "--max-length", "40")
    ask("讲个故事")
    assert "已截断" in capsys.readouterr().err
    assert conversation.cache.get_seq_length() <= 40


# Real terminals and pipes; each start takes seconds, so each session tests much.

SLOW_STORY = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT)!r})
import cli_demo
from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.chat import conversation

stream_chat = ChatGLMForConditionalGeneration.stream_chat
conversations = []

def pause(input_ids, scores):
    time.sleep(0.5)
    return scores

def stream_slowly(self, tokenizer, query, *args, **kwargs):
    processors = [pause] if "故事" in query else []
    return stream_chat(self, tokenizer, query, *args, logits_processor=processors, **kwargs)

class Conversation(conversation.Conversation):
    def __init__(self, *args):
        super().__init__(*args)
        conversations.append(self)

ChatGLMForConditionalGeneration.stream_chat = stream_slowly
conversation.Conversation = Conversation
cli_demo.main(sys.argv[1:])
print("HISTORY" + json.dumps(conversations[0].history) + "END")
"""

ECHO = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import cli_demo
from chatglm2 import ChatGLMTokenizer
from chatglm2.chat.conversation import Conversation
from test_cli_demo import EchoModel

cli_demo.use_utf8()
tokenizer = ChatGLMTokenizer.from_pretrained(sys.argv[1])
cli_demo.chat_loop(Conversation(EchoModel(), tokenizer), settings={{}})
print("LEFT")
"""


def environment(**changes) -> dict[str, str]:
    """This process' environment with one thread, in any locale but the one asked for."""
    names = ("CHATGLM_MODEL", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.slow
@needs_terminal
def test_session_in_a_terminal(tiny_checkpoint, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    script = tmp_path / "slow_story.py"
    script.write_text(SLOW_STORY, "utf-8")
    session = pexpect.spawn(
        sys.executable,
        [str(script), "--model", str(tiny_checkpoint), "--temperature", "0"],
        env=environment(LC_ALL="C.UTF-8", TERM="xterm"),
        encoding="utf-8",
        dimensions=(24, 80),
        timeout=TIMEOUT_S,
    )
    session.expect("欢迎使用 ChatGLM2-6B 模型.*clear 清空对话历史，stop 终止程序.*用户：")
    session.sendline("忘记我吧")
    session.expect("ChatGLM：.*用户：")
    session.sendline("clear")
    session.expect(r"\x1b\[2J.*欢迎使用.*用户：")
    session.sendline("你好世界\x7f\x7f")
    session.expect("ChatGLM：.*ChatGLM2-tiny.*用户：")
    session.sendline("讲个故事")
    session.expect("ChatGLM：.")
    session.sendintr()
    session.expect("已停止.*用户：")
    session.sendintr()
    session.expect("Ctrl-D.*用户：")
    session.sendline("Hello\x1b[D\x1b[D\x1b[Da")  # three times left
    session.expect("ChatGLM：.*用户：")
    session.sendline("stop")
    session.expect("HISTORY(.*)END")
    history = json.loads(session.match[1])
    assert [query for query, _ in history] == ["你好", "讲个故事", "Heallo"]
    assert 0 < len(history[1][1]) < 40
    session.expect(pexpect.EOF)
    session.close()
    assert session.exitstatus == 0


@pytest.mark.slow
@needs_terminal
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, which knows the screen")
def test_backspace_on_the_screen_without_a_locale(tiny_checkpoint, tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO, "utf-8")
    tmux = ["tmux", "-u", "-S", str(tmp_path / "socket"), "-f", os.devnull]
    command = ["env", "LC_ALL=C", sys.executable, str(script), str(tiny_checkpoint)]

    def run(*args) -> str:
        result = subprocess.run([*tmux, *args], env=environment(), capture_output=True, check=True)
        return result.stdout.decode()

    def wait_for(text: str) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while text not in (screen := run("capture-pane", "-p")):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)
        return screen

    run("new-session", "-d", "-x", "80", "-y", "24", *command, ";", "set", "remain-on-exit", "on")
    try:
        wait_for("用户：")
        run("send-keys", "-l", "你好世界")
        wait_for("用户：你好世界")
        run("send-keys", "BSpace", "BSpace")
        run("send-keys", "-l", "北")
        assert "用户：你好北\n" in wait_for("北")
        run("send-keys", "Left")
        run("send-keys", "-l", "东")
        assert "用户：你好东北\n" in wait_for("东")
        run("send-keys", "Enter")
        wait_for("ChatGLM：<你好东北>")
        run("send-keys", "C-d")
        wait_for("LEFT")
    finally:
        run("kill-server")


def run_script(*argv, **kwargs):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, timeout=TIMEOUT_S, **kwargs
    )


@pytest.mark.slow
def test_pipe_without_a_locale(tiny_checkpoint, tmp_path):
    result = run_script(
        *("--model", str(tiny_checkpoint), "--temperature", "0"),
        input="你好\n\nclear\n你好\n".encode() + b"\xff\xfe\n",
        cwd=tmp_path,
        env=environment(LC_ALL="C", PYTHONUTF8="0"),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.decode("utf-8").splitlines()
    assert "ChatGLM2-tiny" in lines[0]
    assert lines[0] in lines[1:]
    assert not any("用户" in line or "ChatGLM：" in line or "欢迎使用" in line for line in lines)


@pytest.mark.slow
def test_prompt_argument_in_another_locale(tiny_checkpoint, tmp_path):
    """The folder is given by CHATGLM_MODEL, relative to the repository."""
    result = run_script(
        *("-p", "你好", "--seed", "1", "--dtype", "bfloat16", "--quantize", "4"),
        cwd=tmp_path,
        env=environment(
            LC_ALL="C", PYTHONUTF8="0", CHATGLM_MODEL=str(tiny_checkpoint.relative_to(ROOT))
        ),
    )
    assert result.returncode == 0, result.stderr
    assert "ChatGLM2-tiny" in result.stdout.decode("utf-8")
    assert result.stdout.decode("utf-8").count("\n") == 1
    assert b"bfloat16 with INT4 weights: " in result.stderr
    assert b"bfloat16 was requested" in result.stderr


@pytest.mark.slow
def test_no_network_and_the_default_model(tmp_path):
    env = environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    env.pop("HF_HUB_OFFLINE", None)
    result = run_script(cwd=tmp_path, env=env, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert result.stdout == b""
    line = result.stderr.decode("utf-8").strip()
    assert "\n" not in line
    assert line.startswith("THUDM/chatglm2-6b: ") and "--model resources/chatglm2-tiny" in line


def test_seed(tiny_checkpoint, capsys, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    argv = ["--model", str(tiny_checkpoint), "-p", "你好", "--seed"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    cli_demo.main([*argv, "7"])
    assert seeds == [7]
