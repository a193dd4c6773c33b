"""The login of the web pages: the flag `--auth`."""

import argparse
from pathlib import Path


def add_login_argument(parser):
    parser.add_argument(
        "--auth",
        type=read_logins,
        metavar="USER:PASSWORD",
        help="ask for this user and password; @FILE reads one or more of them from the lines of a "
        "file, where the list of processes does not show them (default: no login)",
    )


def read_logins(text: str) -> list[tuple[str, str]]:
    """Return users and passwords.

    >>> read_logins("ann:secret")
    [('ann', 'secret')]
    """
    lines = [text]
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text("utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise argparse.ArgumentTypeError(f"{text}: {reason}") from error
    logins = [line.strip("\r").partition(":") for line in lines if line.strip()]
    if not logins or not all(user and password for user, _, password in logins):
        where = f"each line of {text[1:]} must be" if text.startswith("@") else "it must be"
        raise argparse.ArgumentTypeError(f"{where} USER:PASSWORD")
    return [(user, password) for user, _, password in logins]
