"""What web_demo2.py has beside its script: a tab with its answers, and its parts in the browser."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import streamlit as st

from .saved import BROWSER_JS, save_chat
from .shared_model import INTERVAL_S, Chat, SharedModel

CSS = """
ul {list-style: none; padding: 0; margin: 0}
button {all: unset; box-sizing: border-box; cursor: pointer; color: var(--st-text-color);
  padding: 0.3rem 0.5rem; border-radius: var(--st-button-radius); font: inherit;
  font-size: 0.875rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
button:hover, [aria-current] {background: color-mix(in srgb, currentColor 10%, transparent)}
button:focus-visible {outline: 2px solid var(--st-primary-color); outline-offset: -2px}
li button {width: 100%}
button.done::after {content: " ✓"}
"""
JS = BROWSER_JS + Path(__file__).with_name("streamlit_page.js").read_text("utf-8")
LIST = st.components.v2.component(
    "conversations", html='<nav aria-label="对话 Conversations"><ul></ul></nav>', css=CSS, js=JS
)
KEEP = st.components.v2.component("keep", js=JS)
COPY = st.components.v2.component("copy", html="<button>复制 Copy</button>", css=CSS, js=JS)


@dataclass
class Tab:
    """A browser tab: its conversation, which a thread of its own may be answering.

    Attributes:
        id: The name of the conversation in the browser; "" in a tab that has just been opened.
        editing: Index of the question that the next one replaces, with all that follows.
        number: Index of the round that is being answered.
    """

    chat: Chat = field(default_factory=Chat)
    id: str = ""
    editing: int | None = None
    number: int = 0
    thread: Thread | None = None

    @property
    def is_answering(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def open(self, chat: Chat, name: str = ""):
        """Show another conversation."""
        self.stop()
        self.chat, self.id, self.editing = chat, name or uuid.uuid4().hex, None

    def ask(self, shared: SharedModel, query: str, **settings):
        """Begin to answer a question."""
        self.stop()
        if self.editing is not None:
            self.chat.cut(self.editing)
        self.editing, self.id = None, self.id or uuid.uuid4().hex
        self.chat.query, self.chat.notice, self.number = query, "", len(self.chat.rounds)

        async def answer():
            async for _ in shared.answer(self.chat, query, **settings):
                pass

        self.thread = Thread(target=asyncio.run, args=(answer(),), daemon=True)
        self.thread.start()

    def stop(self):
        """End the answer that is growing; what there is of it stays."""
        while self.is_answering:
            self.chat.is_stopped = True
            self.thread.join(INTERVAL_S)

    def save(self) -> dict:
        return {"id": self.id, **save_chat(self.chat)}


@st.cache_resource(show_spinner=False)
def load_once(arguments: tuple[str, ...], _load: Callable):
    """Call `_load` in the first of all runs of the script, and return its result in all of them."""
    return _load()


@st.cache_resource(show_spinner=False, scope="session", on_release=Tab.stop)
def stop_with_session(_tab: Tab) -> Tab:
    """Make Streamlit call `Tab.stop` when the tab is closed; it drops the session itself later."""
    return _tab


def draw_list(tab: Tab, on_pick: Callable):
    """List the conversations that the browser keeps; `on_pick` is called with one of them."""

    def pick():
        if picked := st.session_state.conversations.picked:
            on_pick(picked)

    data = {"part": "list", "chat": tab.save()}
    LIST(key="conversations", data=data, on_picked_change=pick)


def keep(tab: Tab):
    """Keep the conversation in the browser."""
    KEEP(key="keep", data={"part": "keep", "chat": tab.save()}, height=1)


def draw_copy(text: str, key: str):
    """Draw a button that copies this text."""
    COPY(key=key, data={"part": "copy", "text": text}, width="content")


def read_text(name: str, content: bytes) -> str:
    """Return the text of a file in UTF-8 or GB18030.

    Raises:
        ValueError: The file has no text.
    """
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise ValueError(f"{name}: 不是文本文件 / not a text file in UTF-8 or GB18030")
