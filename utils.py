"""What every script shares: the command line, and loading the model that it describes.

torch and transformers are imported by the functions that need them, not by this file: they take
seconds, and neither `--help` nor a wrong flag needs them.
"""

import argparse
import ipaddress
import logging
import math
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

DEFAULT_MODEL = "THUDM/chatglm2-6b"
REQUIREMENTS = [  # a Docker image has only the first
    Path(__file__).parent / name
    for name in ("requirements.txt", "ptuning/requirements.txt", "requirements-dev.txt")
]
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow"}  # whose names differ from those of the modules
# More threads than processors only wait for each other; thousands of them end the process.
MAX_THREADS = max(64, os.cpu_count() or 1)


# Arguments.


def number(kind: type, low, high=None):
    """Return an argparse type: a finite `kind` (int or float) from `low` to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
            if low <= value <= (math.inf if high is None else high) and value != math.inf:
                return value
        except ValueError:
            pass  # refused below
        noun = "an integer" if kind is int else "a number"
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {allowed}")

    return convert


class StoreOnce(argparse.Action):
    """Refuses a flag that is given twice, because the user may expect both values to count."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice: a model takes one")
        setattr(namespace, self.dest, values)


class Extend(argparse.Action):
    """Collects the values of a flag that may be repeated; they replace the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else given + values)


def add_model_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `load_model`; return the group of the advanced ones."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default=os.environ.get("CHATGLM_MODEL") or DEFAULT_MODEL,
        help=f"checkpoint folder or hub name (default: $CHATGLM_MODEL, else {DEFAULT_MODEL})",
    )
    model.add_argument(
        "--revision", help="branch, tag or commit of a model on the hub (default: main)"
    )
    model.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:N or mps (default: auto, a GPU if there is one)",
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="default: auto, the checkpoint's own on a GPU, float32 on a CPU",
    )
    model.add_argument(
        "--quantize",
        type=int,
        choices=[4, 8],
        help="round the weights to INT4 or INT8 while loading (default: as in the checkpoint)",
    )
    model.add_argument(
        "--adapter",
        action=StoreOnce,
        metavar="FOLDER",
        help="a LoRA (PEFT) or a P-Tuning v2 prefix that was trained on the model (default: none)",
    )
    model.add_argument(
        "--num-gpus",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="divide the model over this number of GPUs (default: %(default)s)",
    )
    advanced = parser.add_argument_group("advanced")
    advanced.add_argument(
        "--threads",
        type=number(int, 1, MAX_THREADS),
        metavar="N",
        help="CPU threads (default: $OMP_NUM_THREADS, else the physical cores that this process "
        "may use)",
    )
    advanced.add_argument(
        "--offload-folder",
        metavar="FOLDER",
        help="keep layers that do not fit on the GPU in the CPU's memory, then on the disk; .bin "
        "files are copied into this folder (default: refuse a model that does not fit)",
    )
    advanced.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "float16", "bfloat16"],
        help="dtype of cached keys and values (default: auto, the model's dtype)",
    )
    advanced.add_argument(
        "--quantize-output",
        action="store_true",
        help="round the output layer of a quantized model to INT8 (default: as in the checkpoint; "
        "float16 in the official ones)",
    )
    return advanced


def read_lines(text: str) -> list[str]:
    """Return the lines of the file that is named after an @, without blank ones; else the text."""
    lines = [text]
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text("utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise argparse.ArgumentTypeError(f"{text}: {reason}") from error
    return [line.strip("\r") for line in lines if line.strip()]


def read_keys(text: str) -> list[str]:
    """Return keys without the white space around them, such as the end of a line."""
    keys = [line.strip() for line in read_lines(text)]
    if not keys:
        what = f"{text}: the file has no key" if text.strip() else "the key is empty"
        raise argparse.ArgumentTypeError(f"{what}: give one, or leave the flag out")
    if not all(key.isprintable() for key in keys):
        raise argparse.ArgumentTypeError("the key has characters that cannot be sent")
    return keys


def read_host(text: str) -> str:
    """Return a host name as browsers send it."""
    name = text.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    with suppress(ValueError):
        name = name.encode("idna").decode()
        if re.fullmatch(r"[\w.-]+", name, re.ASCII) or ipaddress.IPv6Address(name):
            return name
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a host name such as gpu.example, or an address, without a port"
    )


def read_origin(text: str) -> str:
    """Return an origin as browsers send it."""
    origin = text.lower().removesuffix("/")
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9.+-]*://[^\s/?#]+", origin):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the address of a site such as https://chat.example or "
            "http://localhost:3000"
        )
    return origin


def read_logins(text: str) -> list[tuple[str, str]]:
    """Return users and passwords.

    >>> read_logins("ann:secret")
    [('ann', 'secret')]
    """
    logins = [line.partition(":") for line in read_lines(text)]
    if not logins or not all(user and password for user, _, password in logins):
        where = f"each line of {text[1:]} must be" if text.startswith("@") else "it must be"
        raise argparse.ArgumentTypeError(f"{where} USER:PASSWORD")
    return [(user, password) for user, _, password in logins]


def add_auth(group):
    group.add_argument(
        "--auth",
        type=read_logins,
        action=Extend,
        metavar="USER:PASSWORD",
        help="ask for this user and password; may be repeated; @FILE reads one or more of them "
        "from the lines of a file, where the list of processes does not show them (default: no "
        "login)",
    )


def add_allowed_host(group):
    group.add_argument(
        "--allowed-host",
        type=read_host,
        action="append",
        default=[],
        metavar="NAME",
        help="serve requests that call this server by this name, too; may be repeated (default: "
        "localhost, 127.0.0.1, ::1 and --host; every name if --host admits other machines)",
    )


def add_server_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of both HTTP servers."""
    server = parser.add_argument_group("server")
    count, positive = number(int, 0), number(float, 0)
    for flag, kind, metavar, default, text in (
        ("--host", str, "HOST", "127.0.0.1", "address to listen on; 0.0.0.0 admits other machines"),
        ("--port", number(int, 0, 65535), "PORT", 8000, "port to listen on; 0 picks a free one"),
        ("--max-batch", number(int, 1), "N", 8, "answers that are generated at the same time"),
        ("--max-queue", count, "N", 64, "requests that may wait for a place"),
        ("--context", number(int, 1), "N", 8192, "most tokens of a prompt and its answer"),
        ("--kept-tokens", count, "N", 16384, "tokens that are kept for the next rounds"),
        ("--max-body", positive, "MB", 4.0, "largest size of a request"),
        ("--grace", positive, "SECONDS", 5.0, "time for running answers when the server stops"),
    ):
        text = f"{text} (default: {default})"
        server.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)
    server.add_argument(
        "--api-key",
        type=read_keys,
        action=Extend,
        default=os.environ.get("CHATGLM_API_KEY") or None,
        metavar="KEY",
        help="key that clients must send; may be repeated; @FILE reads one or more keys from the "
        "lines of a file, where the list of processes does not show them (default: "
        "$CHATGLM_API_KEY, else none)",
    )
    add_allowed_host(server)
    server.add_argument(
        "--cors",
        type=read_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="allow web pages of this origin to call the server; may be repeated (default: none)",
    )


def add_page_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of the page with Gradio."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    server.add_argument(
        "--port", type=number(int, 1, 65535), help="default: the first free one from 7860 on"
    )
    server.add_argument(
        "--share", action="store_true", help="make a public link through Gradio's site"
    )
    add_allowed_host(server)
    add_auth(server)


def parse_args(doc: str, add_arguments, argv=None) -> argparse.Namespace:
    """Parse the command line of a script: its own arguments and those of `load_model`.

    Args:
        doc: The script's docstring, whose first line `--help` shows.
        add_arguments: A function of this file that adds the script's own arguments to a parser.
    """
    if argv is None:
        return parse_command_line(doc, add_arguments)
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    add_arguments(parser)
    add_model_arguments(parser)
    return parser.parse_args(argv)


@cache
def parse_command_line(doc: str, add_arguments) -> argparse.Namespace:
    """Parse the command line once, because a file that a flag names may be a pipe."""
    return parse_args(doc, add_arguments, sys.argv[1:])


# Running.


def start_script(doc: str, add_arguments):
    """Answer --help and refuse wrong flags before a script's imports, which take seconds."""
    open_closed_streams()
    parse_args(doc, add_arguments)
    announce_start()


def open_closed_streams():
    """Open the standard streams that the caller has closed: a file would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
            if name == "stdout":
                print("stdout is closed: what is printed there is lost.", file=sys.stderr)


def run_script(main):
    """Run a script; Ctrl-C, a closed pipe or a full disk end it without a traceback."""
    open_closed_streams()
    logging.raiseExceptions = False  # else each line that cannot be logged prints a traceback
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if os.environ.get("CHATGLM_TRACEBACK"):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest
        is_closed = isinstance(error, BrokenPipeError)  # its reader has read enough
        hint = "CHATGLM_TRACEBACK=1 shows the traceback"
        sys.exit(1 if is_closed else f"{type(error).__name__}: {error} ({hint})")


# Loading.


def print_error(kind, error, traceback, print_other=sys.excepthook):
    """Print what cannot be imported as one line, any other error as before."""
    if issubclass(kind, ImportError) and str(error).startswith("ChatGLM2 needs transformers"):
        print(error, file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and not os.environ.get("CHATGLM_TRACEBACK"):
        name = error.name.partition(".")[0]
        package = PACKAGES.get(name, name)
        has_it = rf"(?m)^{package}\b".replace("_", "[-_]")
        present = filter(Path.exists, REQUIREMENTS)
        files = [file for file in present if re.search(has_it, file.read_text("utf-8"))]
        argument = f"-r {files[0]}" if files else package
        print(f"缺少 {name} / {name} is missing: pip install {argument}", file=sys.stderr)
    else:
        print_other(kind, error, traceback)


sys.excepthook = print_error  # scripts import libraries before they can catch an error


def announce_start():
    """Say in a terminal that a script starts, before its imports, which take seconds.

    Until `load_model` has imported the rest, Ctrl-C ends the process at once, without a traceback.
    """
    if sys.stderr.isatty():
        print(
            "正在启动，需要几秒 / starting, which takes some seconds", file=sys.stderr, flush=True
        )
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def load_model(args: argparse.Namespace):
    """Return tokenizer and model; see `chatglm2.loading.load_model`."""
    from chatglm2 import loading

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return loading.load_model(args)


def load_model_on_gpus(checkpoint_path, num_gpus: int = 2, device_map=None, **kwargs):
    """Return a model over several GPUs; see `chatglm2.placement.load_model_on_gpus`."""
    from chatglm2 import placement

    return placement.load_model_on_gpus(checkpoint_path, num_gpus, device_map, **kwargs)


def auto_configure_device_map(num_gpus: int, num_layers: int = 28) -> dict[str, int]:
    """Return an even division; see `chatglm2.placement.auto_configure_device_map`."""
    from chatglm2 import placement

    return placement.auto_configure_device_map(num_gpus, num_layers)
