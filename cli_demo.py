"""Chat with ChatGLM2 in the terminal.

    python cli_demo.py --model resources/chatglm2-tiny
    python cli_demo.py -p "你好"            # ask once, print the answer
    python cli_demo.py < questions.txt      # one question a line

Ctrl-C ends an answer and keeps the conversation; Ctrl-D leaves.
"""

import argparse
import locale
import os
import signal
import sys
import threading
from contextlib import closing, contextmanager, suppress

import torch

import utils
from chatglm2 import CHAT_DEFAULTS
from chatglm2.chat.conversation import DROPPED, STOPPED, Conversation
from chatglm2.command_line import number

WELCOME = (
    "欢迎使用 ChatGLM2-6B 模型，输入内容即可进行对话，clear 清空对话历史，stop 终止程序\n"
    "Welcome to ChatGLM2-6B: type a message, clear to start anew, stop to leave"
)
CLEAR_SCREEN = "\033[2J\033[3J\033[H"


def notice(text: str):
    print(f"[{text}]", file=sys.stderr, flush=True)


def make_room(conversation: Conversation, query: str, args) -> int:
    room, dropped = conversation.make_room(query, args.max_length)
    if dropped:
        notice(DROPPED.format(dropped))
    return room


def ask(conversation: Conversation, query: str, room: int, args, stop: threading.Event):
    """Print the answer as it grows, until it ends, has `room` tokens, or `stop` is set."""
    shown, settings = "", {"top_p": args.top_p, "temperature": args.temperature}
    if args.prompt_lookup:
        settings["prompt_lookup_num_tokens"] = args.prompt_lookup
    answers = conversation.stream(query, room, **settings)
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
        notice(STOPPED)
    elif conversation.was_cut:
        notice("回答达到长度上限，已截断 / the answer was cut: --max-length is reached")


@contextmanager
def ctrl_c_event(is_interactive: bool):
    """Turn Ctrl-C into an event, which strikes between two tokens; without a terminal, do not."""
    event = threading.Event()
    if not is_interactive:
        yield event
        return
    previous = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def read_queries(is_interactive: bool):
    """Yield line after line, typed or piped in, until the input ends."""
    if not is_interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("\n用户：")
        except KeyboardInterrupt:
            print()
            notice("输入 stop 或按 Ctrl-D 退出 / type stop or press Ctrl-D to leave")
        except EOFError:
            print()
            return


def respond(conversation: Conversation, query: str, args, is_interactive: bool):
    try:
        room = make_room(conversation, query, args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return
    if is_interactive:
        print("\nChatGLM：", end="", flush=True)
    with ctrl_c_event(is_interactive) as stop:
        ask(conversation, query, room, args, stop)


def chat_loop(model, tokenizer, args):
    """Answer line after line of the terminal or of a pipe, until `stop` or the end of the input."""
    is_interactive = sys.stdin.isatty()
    conversation = Conversation(model, tokenizer)
    if is_interactive:
        print(WELCOME)
    for query in read_queries(is_interactive):
        match query.strip():
            case "":
                continue
            case "stop":
                return
            case "clear":
                conversation.clear()
                if is_interactive:
                    print(CLEAR_SCREEN if sys.stdout.isatty() else "", WELCOME, sep="")
            case _:
                respond(conversation, query, args, is_interactive)


def ask_once(model, tokenizer, args):
    conversation = Conversation(model, tokenizer)
    query = os.fsencode(args.prompt).decode("utf-8", "replace")  # its bytes, whatever the locale
    try:
        room = make_room(conversation, query, args)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    ask(conversation, query, room, args, threading.Event())


def use_utf8():
    """Read and write UTF-8 whatever the locale says, and edit typed lines with readline."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    if locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ["LC_ALL"] = "C.UTF-8"  # for readline, which erases characters by the locale
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    utils.add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", help="ask this once, print the answer and leave")
    parser.add_argument(
        "--max-length",
        type=number(int, 1),
        default=CHAT_DEFAULTS["max_length"],
        help="tokens of a conversation; the oldest rounds go first (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        default=CHAT_DEFAULTS["top_p"],
        help="sample from the likeliest tokens of this total probability (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0),
        default=CHAT_DEFAULTS["temperature"],
        help="0 takes the likeliest token always (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**64 - 1), help="the same seed, the same answers"
    )
    parser.add_argument(
        "--prompt-lookup",
        type=number(int, 1),
        metavar="N",
        help="with --temperature 0: where the answer repeats something of the conversation, try "
        "its next N tokens in one step; faster for answers that quote",
    )
    args = parser.parse_args(argv)
    if args.prompt_lookup and args.temperature:
        parser.error(
            f"--prompt-lookup {args.prompt_lookup} needs --temperature 0, not {args.temperature}: "
            "it is made for greedy answers"
        )
    return args


def main(argv=None):
    use_utf8()
    args = parse_args(argv)
    tokenizer, model = utils.load_model(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    run = chat_loop if args.prompt is None else ask_once
    run(model, tokenizer, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
