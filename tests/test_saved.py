"""`saved`: conversations of the browser and of files."""

import json

import pytest

from chatglm2.chat.saved import read_chat, read_file, save_chat, to_document, to_json
from chatglm2.chat.shared_model import Chat

ROUNDS = [["a <b>", "1 < 2", "2 tokens"], ["c", "3", ""]]


def test_a_conversation_goes_to_the_browser_and_back():
    chat = Chat(rounds=ROUNDS, first_round=1, system="s", query="q", notice="n", is_stopped=True)
    saved = {**json.loads(json.dumps(save_chat(chat))), "id": "x", "time": 1}
    assert read_chat(saved) == Chat(rounds=ROUNDS, first_round=1, system="s")
    assert read_chat(saved, "t").system == "t"


def write(*pairs, **fields) -> str:
    messages = [{"role": role, "content": text} for role, text in pairs]
    return json.dumps({"messages": messages, **fields})


def test_files():
    chat = read_file(write(("system", "s"), ("user", "a"), ("assistant", "b"), title="x"))
    assert chat == Chat(rounds=[["a", "b", ""]], system="s")
    assert read_file(to_json(chat)) == chat
    assert to_document(chat) == "## system\n\ns\n\n## user\n\na\n\n## assistant\n\nb\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"messages": 1}',
        '{"messages": [1]}',
        '{"messages": [{"role": "user"}]}',
        "[" * 100_000,
        write(),
        write(("system", "s")),
        write(("user", "a")),
        write(("assistant", "a"), ("user", "b")),
        write(("user", "a"), ("assistant", 1)),
        write(("system", None), ("user", "a"), ("assistant", "b")),
        write((["user"], "a"), ("assistant", "b")),
    ],
)
def test_files_that_are_no_conversation(content):
    with pytest.raises(ValueError, match="not a conversation") as error:
        read_file(content)
    assert "\n" not in str(error.value)
