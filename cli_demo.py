"""Chat with ChatGLM2 in the terminal.

    python cli_demo.py --model resources/chatglm2-tiny
    python cli_demo.py -p "你好"            # ask once, print the answer
    python cli_demo.py < questions.txt      # one question per line

Ctrl-C ends an answer and keeps the conversation; Ctrl-D leaves. A pasted text is one question.
"""

import argparse
import locale
import os
import signal
import sys
import threading
from contextlib import closing, contextmanager, suppress

import utils

WELCOME = (
    "欢迎使用 ChatGLM2-6B 模型，输入内容即可进行对话，clear 清空对话历史，stop 终止程序，help 帮助"
    "\nWelcome to ChatGLM2-6B: type a message, clear to start anew, stop to leave, help for more"
)
QUOTES = '"""'  # a line of only these begins and ends a question of several lines
HELP = f"""\
clear             清空对话历史 / start a new conversation
stop, exit, quit  退出，也可以按 Ctrl-D / leave, as Ctrl-D does
Ctrl-C            中止当前回答 / end an answer
{QUOTES}               输入多行，再用一行 {QUOTES} 结束 / type several lines, up to another {QUOTES}
粘贴的多行文字是一个问题 / a pasted text of several lines is one question
python cli_demo.py --help 列出全部参数 / lists all flags"""
EXAMPLES = """\
examples:
  python cli_demo.py --model path/to/chatglm2-6b --quantize 4
  python cli_demo.py --model resources/chatglm2-tiny -p "你好"
"""
CLEAR_SCREEN = "\033[2J\033[3J\033[H"


def read_prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "问题是空的 / the question is empty: give a text, or leave -p out to chat"
        )
    return os.fsencode(text).decode("utf-8", "replace")  # its bytes, whatever the locale


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python cli_demo.py [--model MODEL] [-p TEXT] [other flags, see --help]",
        description=__doc__.partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat = parser.add_argument_group("conversation")
    chat.add_argument(
        "-p",
        "--prompt",
        type=read_prompt,
        metavar="TEXT",
        help="ask once, print the answer and leave",
    )
    chat.add_argument(
        "--max-length",
        type=utils.number(int, 1),
        metavar="N",
        help="tokens of a conversation; the oldest rounds are dropped first (default: 8192)",
    )
    chat.add_argument(
        "--top-p",
        type=utils.number(float, 0, 1),
        metavar="P",
        help="sample from the likeliest tokens of this total probability (default: 0.8)",
    )
    chat.add_argument(
        "--temperature",
        type=utils.number(float, 0),
        metavar="T",
        help="0 always takes the likeliest token (default: 0.8)",
    )
    chat.add_argument(
        "--seed",
        type=utils.number(int, 0, 2**64 - 1),
        metavar="N",
        help="repeat the answers of an earlier run with this seed (default: random)",
    )
    advanced = utils.add_model_arguments(parser)
    advanced.add_argument(
        "--prompt-lookup",
        dest="prompt_lookup_num_tokens",
        type=utils.number(int, 1),
        metavar="N",
        help="with --temperature 0: where the answer repeats a part of the conversation, try its "
        "next N tokens in one step; faster for answers that quote (default: off)",
    )
    args = parser.parse_args(argv)
    if args.prompt_lookup_num_tokens and args.temperature != 0:
        parser.error(f"--prompt-lookup {args.prompt_lookup_num_tokens} needs --temperature 0")
    return args


def read_settings(args: argparse.Namespace) -> dict:
    """Return the arguments of `Conversation.stream`; it has the defaults of all others."""
    names = ("max_length", "top_p", "temperature", "prompt_lookup_num_tokens")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def notice(text: str):
    print(f"[{text}]", file=sys.stderr, flush=True)


def start_answer(conversation, query: str, settings: dict):
    answers = conversation.stream(query, **settings)
    if conversation.num_dropped:
        notice(conversation.DROPPED.format(conversation.num_dropped))
    return answers


def print_answer(conversation, answers, stop: threading.Event):
    """Print an answer of `conversation.stream` as it grows, until it ends or `stop` is set."""
    shown = ""
    with closing(answers):
        for answer in answers:
            if not answer.startswith(shown):  # a placeholder was filled in: print it anew
                print()
                shown = ""
            print(answer[len(shown) :], end="", flush=True)
            shown = answer
            if stop.is_set():
                break
    print(flush=True)
    if stop.is_set():
        notice(conversation.STOPPED)
    elif conversation.was_cut:
        notice("回答达到长度上限，已截断 / the answer was cut: --max-length is reached")


@contextmanager
def ctrl_c_event(is_interactive: bool):
    """Turn Ctrl-C into an event, which is read between two tokens; only in a terminal."""
    event = threading.Event()
    if not is_interactive:
        yield event
        return
    previous = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def read_query() -> str:
    """Return a question that is typed: a line, a pasted text, or lines between two `QUOTES`."""
    query = input("\n用户：")
    if query.strip() != QUOTES:
        return query
    lines = []
    while (line := input("... ")).strip() != QUOTES:
        lines.append(line)
    return "\n".join(lines)


def read_queries(is_interactive: bool):
    """Yield question after question, typed or piped in, until the input ends."""
    if not is_interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield read_query()
        except KeyboardInterrupt:
            print()
            notice("输入 stop 或按 Ctrl-D 退出 / type stop or press Ctrl-D to leave")
        except EOFError:
            print()
            return


def respond(conversation, query: str, settings: dict, is_interactive: bool):
    try:
        answers = start_answer(conversation, query, settings)
    except ValueError as error:  # the question is too long
        print(error, file=sys.stderr)
        return
    if is_interactive:
        print("\nChatGLM：", end="", flush=True)
    with ctrl_c_event(is_interactive) as stop:
        print_answer(conversation, answers, stop)


def chat_loop(conversation, settings: dict):
    """Answer all questions of the terminal or of a pipe, until `stop` or the end of the input."""
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        print(WELCOME)
    for query in read_queries(is_interactive):
        match query.strip():
            case "":
                continue
            case "stop":
                return
            case "exit" | "quit" if is_interactive:
                return
            case "help" if is_interactive:
                print(HELP)
            case "clear":
                conversation.clear()
                if is_interactive:
                    print(CLEAR_SCREEN if sys.stdout.isatty() else "", WELCOME, sep="")
            case _:
                respond(conversation, query, settings, is_interactive)


def ask_once(conversation, prompt: str, settings: dict):
    try:
        answers = start_answer(conversation, prompt, settings)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print_answer(conversation, answers, threading.Event())


def use_utf8():
    """Read and write UTF-8, whatever the locale says."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    if locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ["LC_ALL"] = "C.UTF-8"  # for readline, which erases characters by the locale


def edit_lines():
    """Let the user edit typed lines; a pasted text is one question, whatever lines it has."""
    with suppress(ImportError):  # not on Windows
        import readline

        if "libedit" not in readline.__doc__:  # macOS's, which cannot
            readline.parse_and_bind("set enable-bracketed-paste on")


def main(argv=None):
    use_utf8()
    args = parse_args(argv)
    utils.announce_start()
    if sys.stdin.isatty():
        edit_lines()
    tokenizer, model = utils.load_model(args)
    import torch  # as in utils.py: not before the arguments are known to be right

    from chatglm2.chat.conversation import Conversation

    if args.seed is not None:
        torch.manual_seed(args.seed)
    conversation, settings = Conversation(model, tokenizer), read_settings(args)
    if args.prompt is None:
        chat_loop(conversation, settings)
    else:
        ask_once(conversation, args.prompt, settings)


if __name__ == "__main__":
    utils.run_script(main)
    os._exit(0)  # Python would take seconds to delete all objects of torch
