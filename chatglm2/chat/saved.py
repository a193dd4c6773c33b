"""A conversation of a web page outside the server: in the browser's storage, in a file."""

import json
from pathlib import Path

from .shared_model import Chat

BROWSER_JS = Path(__file__).with_name("browser.js").read_text("utf-8")
FIELDS = ("rounds", "first_round", "system")  # of a chat, that the browser keeps
FORMAT = (
    '文件格式不对 / not a conversation: a JSON file {"messages": [...]} is needed, with "role" and '
    '"content" in each message, user and assistant in turn'
)


def read_chat(saved: dict, system: str | None = None) -> Chat:
    """Return the conversation that the browser kept; `system` replaces its system text."""
    fields = {name: saved[name] for name in FIELDS if name in saved}
    return Chat(**fields if system is None else {**fields, "system": system})


def save_chat(chat: Chat) -> dict:
    """Return what the browser keeps of a conversation."""
    return {name: getattr(chat, name) for name in (*FIELDS, "query")}


def read_file(content: str | bytes) -> Chat:
    """Return the conversation of an exported file.

    Raises:
        ValueError: The file has another format.
    """
    try:
        messages = [(m["role"], m["content"]) for m in json.loads(content)["messages"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(FORMAT) from error
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    roles, texts = [role for role, _ in messages], [text for _, text in messages]
    is_text = all(isinstance(text, str) for text in (system, *texts))
    if not messages or not is_text or roles != ["user", "assistant"] * (len(messages) // 2):
        raise ValueError(FORMAT)
    rounds = [[query, answer, ""] for query, answer in zip(texts[::2], texts[1::2], strict=True)]
    return Chat(rounds=rounds, system=system)


def to_json(chat: Chat) -> str:
    """Return the file that `read_file` reads."""
    messages = chat.list_messages(chat.rounds)
    return json.dumps({"messages": messages}, ensure_ascii=False, indent=2)


def to_document(chat: Chat) -> str:
    """Return the conversation as Markdown."""
    messages = chat.list_messages(chat.rounds)
    return "\n".join("## {role}\n\n{content}\n".format(**message) for message in messages)
