"""What tests share that load a model as the scripts do, or fail to."""

import argparse

import pytest

import utils


def parse(*argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    return parser.parse_args([*map(str, argv)])


def load(folder, *flags):
    """Return tokenizer and model, as `utils.load_model`."""
    return utils.load_model(parse("--model", folder, *flags))


def fail(function, *args, **kwargs) -> str:
    """Run what must end the program, and return its one line."""
    with pytest.raises(SystemExit) as error:
        function(*args, **kwargs)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def fail_to_load(folder, *flags) -> str:
    return fail(load, folder, *flags)
