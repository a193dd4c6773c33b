"""What web_demo.py shows of a conversation."""

from functools import lru_cache
from html import escape
from pathlib import Path

import gradio as gr

from .markdown import to_markdown
from .saved import BROWSER_JS
from .shared_model import Chat

HEAD = Path(__file__).with_name("gradio_head.html")  # styles and scripts
FONTS = ["Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
THEME = gr.themes.Default(primary_hue="blue", font=FONTS).set(
    button_primary_background_fill="*primary_600",  # enough contrast with white
    button_primary_background_fill_hover="*primary_700",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
)
SCRIPT = f"<script>{BROWSER_JS}</script>"  # Gradio puts it before `HEAD`
LOOK = {"theme": THEME, "footer_links": [], "head": SCRIPT, "head_paths": HEAD}
LATEX = [
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]
IMPORT = '<label class="import">导入 JSON Import<input type="file" accept=".json"></label>'
HTML = gr.HTML(apply_default_css=False).get_config()
COPY = '<button data-round="{0}" data-copy="{1}" title="复制 Copy" aria-label="复制 Copy"></button>'
EDIT = '<button data-edit="{0}" title="修改 Edit" aria-label="修改 Edit"></button>'


def list_conversations() -> gr.HTML:
    """Return a component that lists the conversations that the browser keeps.

    Its value is the current one. Events: `input` when another one was picked, `edit` with the index
    of a question, or `None` to give up the edit, `upload` with the text of a file.
    """
    return gr.HTML(
        {"id": "", "rounds": []},
        html_template='<nav aria-label="对话 Conversations"><ul></ul></nav>',
        elem_id="conversations",
        apply_default_css=False,
        js_on_load="conversations.connect(element, props, trigger, watch)",
    )


def show_chat(chat: Chat) -> list[dict]:
    """Return the messages of the chatbot."""
    messages = [message for i, texts in enumerate(chat.rounds) for message in show_round(i, *texts)]
    if chat.query:
        messages += [
            show_message("user", literal(chat.query)),
            show_message("assistant", text("…")),
        ]
    return messages


@lru_cache(maxsize=1000)
def show_round(index: int, query: str, answer: str, remark: str) -> tuple[dict, dict]:
    question = literal(query, COPY.format(index, 0) + EDIT.format(index))
    footer = html(f'<div class="actions">{COPY.format(index, 1)} {escape(remark)}</div>')
    return (
        show_message("user", question),
        show_message("assistant", text(to_markdown(answer, "gradio")), footer),
    )


def show_message(role: str, *content: dict) -> dict:
    return {"role": role, "content": list(content)}


def text(markdown: str) -> dict:
    return {"type": "text", "text": markdown}


def html(value: str) -> dict:
    props = {**HTML, "value": value}
    return {
        "type": "component",
        "component": "html",
        "value": value,
        "constructor_args": {},
        "props": props,
    }


def literal(query: str, buttons: str = "") -> dict:
    """Return a question as it was typed."""
    return html(f'<div class="question">{escape(query)}</div><div class="actions">{buttons}</div>')
