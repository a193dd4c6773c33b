"""`gradio_page`: the messages of a conversation."""

from chatglm2.chat.gradio_page import show_chat
from chatglm2.chat.shared_model import Chat

ROUNDS = [["a <b>", "1 < 2", "2 tokens"], ["c", "3", ""]]


def test_messages():
    messages = show_chat(Chat(rounds=ROUNDS, query="<i>"))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert '<div class="question">a &lt;b&gt;</div>' in messages[0]["content"][0]["value"]
    assert "2 tokens" in messages[1]["content"][1]["value"]
    assert "&lt;i&gt;" in messages[4]["content"][0]["value"]
    assert "<button" not in messages[4]["content"][0]["value"]
