"""`command_line`: the type of numbers."""

import argparse

import pytest

from chatglm2.command_line import number


@pytest.mark.parametrize("text", ["0", "2", "1.5"])
def test_number_accepts(text):
    assert number(float, 0, 2)(text) == float(text)


@pytest.mark.parametrize("text", ["-0.1", "2.1", "nan", "inf", "", "二"])
def test_number_names_the_value_and_the_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number from 0 to 2") as error:
        number(float, 0, 2)(text)
    assert repr(text) in str(error.value)
