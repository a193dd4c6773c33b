"""What tests share that load a model as the scripts do, or fail to."""

import argparse

import pytest

import utils


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    return parser.parse_args(argv)


def fail(function, *args) -> str:
    """Run what must end the program, and return its one line."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def fail_to_load(*argv: str) -> str:
    return fail(utils.load_model, parse(*argv))
