"""Types of command-line arguments, and errors in one line."""

import argparse
import math


def number(kind: type, low, high=None):
    """Return an argparse type: a finite `kind` (int or float) from `low` to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and low <= value and (high is None or value <= high):
            return value
        noun = "an integer" if kind is int else "a number"
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {allowed}")

    return convert


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
