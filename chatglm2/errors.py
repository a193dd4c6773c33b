"""Error messages of one line, and the end of a script that cannot load its model."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from transformers.utils import logging

PACKAGE = Path(__file__).resolve().parent
MAX_LENGTH = 2000  # characters of a message
EXPLAINED = (OSError, ValueError, ImportError)  # where this project raises them, with a next step


def one_line(error: BaseException) -> str:
    """Return the message without line breaks and without control characters of a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def is_explained(error: Exception) -> bool:
    """Return whether this project has raised an error, with all that the user needs to know."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    own = Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
    return own and isinstance(error, EXPLAINED)


@contextmanager
def exit_on_error(prefix: str):
    """End the program with one line about any error: the prefix, the error's kind and message.

    A message that begins with the prefix, such as the path of a file in a folder, is not repeated.
    With the environment variable CHATGLM_TRACEBACK the error itself is raised.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("CHATGLM_TRACEBACK"):
            raise
        message = one_line(error)[:MAX_LENGTH]
        if not is_explained(error):
            kind, hint = type(error).__name__, "CHATGLM_TRACEBACK=1 shows the traceback"
            message = f"{kind}: {message} ({hint})" if message != kind else f"{kind} ({hint})"
        has_prefix = message.startswith(prefix.rstrip(": "))
        raise SystemExit(message if has_prefix else f"{prefix}{message}") from error


def run_command(main):
    """Run the main function of a `python -m chatglm2...`; Ctrl-C ends it without a traceback."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)


def print_result(line: str):
    """Print the last line of a program, also if stdout is a full disk or a closed pipe."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again
        raise SystemExit(f"{line} The output cannot be written: {error.strerror}.") from error
