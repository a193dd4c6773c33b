"""`login`: the flag `--auth`."""

import argparse

import pytest

from chatglm2.chat.login import add_login_argument


@pytest.fixture
def parse():
    parser = argparse.ArgumentParser()
    add_login_argument(parser)
    return lambda *flags: parser.parse_args(flags).auth


def test_users_and_passwords(parse, tmp_path):
    assert parse() is None
    assert parse("--auth", "ann:a:b c") == [("ann", "a:b c")]
    file = tmp_path / "logins"
    file.write_text("\ufeffann:secret\r\n\nbob:密码\n", "utf-8")
    assert parse("--auth", f"@{file}") == [("ann", "secret"), ("bob", "密码")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "must be USER:PASSWORD"),
        (b"ann:secret\nbob", "must be USER:PASSWORD"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used(content, message, parse, tmp_path, capsys):
    file = tmp_path / "logins"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        parse("--auth", f"@{file}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in error and message in error


@pytest.mark.parametrize("value", ["", "ann", "ann:", ":secret"])
def test_a_value_that_cannot_be_used(value, parse, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--auth", value)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--auth: it must be USER:PASSWORD" in error
    assert value in ("", "ann") or value not in error  # no password in the terminal's history
