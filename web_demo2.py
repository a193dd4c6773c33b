"""Chat with ChatGLM2 in the browser, with Streamlit.

    streamlit run web_demo2.py -- --model resources/chatglm2-tiny

Then open http://127.0.0.1:8501. Streamlit's own options, such as --server.port, stand before the
`--`; those of this script after it.
"""

import sys
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from streamlit import runtime

import utils

if not runtime.exists():  # the script is started; else a browser uses the page
    if __name__ == "__main__":
        command = __doc__.splitlines()[2]
        raise SystemExit(f"请用 streamlit 启动 / start it with streamlit:\n\n{command}\n")
    utils.start_script(__doc__, utils.add_auth)

from chatglm2.chat.markdown import to_markdown
from chatglm2.chat.saved import read_chat, read_file, to_document, to_json
from chatglm2.chat.shared_model import (
    EDITING,
    EXAMPLES,
    WELCOME,
    Chat,
    SharedModel,
    sampling_sliders,
)
from chatglm2.chat.streamlit_login import Login
from chatglm2.chat.streamlit_page import (
    Tab,
    draw_copy,
    draw_list,
    keep,
    load_once,
    read_text,
    stop_with_session,
)
from chatglm2.loading import describe

INTERVAL_S = 0.1  # between two drawn steps of an answer
state = st.session_state  # of the browser tab; "box" and "system" are texts that the user types


def load() -> tuple[SharedModel, str]:
    """Return the model and a line that describes it."""
    args = utils.parse_args(__doc__, utils.add_auth)
    tokenizer, model = utils.load_model(args)
    return SharedModel(model, tokenizer), describe(Path(args.model).resolve().name, model)


# Callbacks: what a button does before the page is drawn again.


def open_chat(tab: Tab, chat: Chat, name: str = ""):
    tab.open(chat, name)
    state.system = chat.system


def pick(tab: Tab, saved: dict):
    """Open a conversation that the browser has kept."""
    open_chat(tab, read_chat(saved), saved["id"])
    tab.chat.query = saved.get("query", "")  # the tab was closed before its answer began


def edit(tab: Tab, index: int):
    """Put an earlier question into the text box; sending it replaces what follows."""
    tab.editing, state.box = index, tab.chat.rounds[index][0]


def give_up_edit(tab: Tab):
    tab.editing, state.box = None, ""


def undo(tab: Tab):
    tab.editing, state.box = None, tab.chat.cut(-1)


def retry(tab: Tab):
    tab.editing, state.question = None, tab.chat.cut(-1)


def import_file(tab: Tab):
    """Open the conversation of the file that was chosen."""
    file = state[f"file {tab.id}"]
    try:
        if file:
            open_chat(tab, read_file(file.getvalue()))
    except ValueError as error:
        tab.chat.notice = str(error)


# Parts of the page.


def draw_conversations(tab: Tab):
    st.button("新对话 New chat", on_click=open_chat, args=(tab, Chat()), width="stretch")
    draw_list(tab, lambda saved: pick(tab, saved))
    with st.expander("导入导出 Import, export"):
        for kind, text in (("Markdown", to_document(tab.chat)), ("JSON", to_json(tab.chat))):
            name = f"chat.{kind.lower()}"
            st.download_button(f"导出 {kind}", text, name, on_click="ignore", width="stretch")
        st.file_uploader(
            "导入 JSON Import",
            "json",
            key=f"file {tab.id}",
            on_change=import_file,
            args=(tab,),
            max_upload_size=10,
        )


def draw_settings(shared: SharedModel, tab: Tab) -> dict:
    """Draw the settings and return them."""
    with st.expander("参数设置 Settings"):
        tab.chat.system = st.text_area("系统提示 System prompt", key="system")
        settings = {
            name: st.slider(*slider.values(), key=name)
            for name, slider in sampling_sliders(shared.model).items()
        }
    args = (tab, Chat(system=state.system), tab.id)
    st.button("🗑 清空对话 Clear history", on_click=open_chat, args=args, width="stretch")
    return settings


def draw_box(tab: Tab) -> str:
    """Draw the text box; return a question that was sent, or "".

    The text of a file becomes part of the question.
    """
    label = "输入问题，回车发送 / Type a message"
    with st.bottom:
        sent = st.chat_input(label, key="box", accept_file="multiple", max_upload_size=1)
    if not sent:
        return state.pop("question", "")
    try:
        texts = [sent.text, *(read_text(file.name, file.getvalue()) for file in sent.files)]
    except ValueError as error:
        tab.stop()
        tab.chat.query, tab.chat.notice = sent.text, str(error)
        st.rerun()
    return "\n\n".join(filter(str.strip, texts))


def draw_round(tab: Tab, number: int, query: str, answer: str, remark: str):
    with st.chat_message("user"):
        st.text(query)
        with st.container(horizontal=True, vertical_alignment="center"):
            draw_copy(query, f"copy question {number}")
            st.button(
                "修改 Edit",
                key=f"edit {number}",
                on_click=edit,
                args=(tab, number),
                type="tertiary",
                disabled=tab.is_answering,
            )
    with st.chat_message("assistant"):
        st.markdown(to_markdown(answer, "streamlit"))
        with st.container(horizontal=True, vertical_alignment="center"):
            draw_copy(answer, f"copy answer {number}")
            if number == len(tab.chat.rounds) - 1 and not tab.is_answering:
                for label, callback in (("重试 Retry", retry), ("撤销 Undo", undo)):
                    st.button(label, on_click=callback, args=(tab,), type="tertiary")
            st.markdown(f":small[{remark}]")


def draw_answer(tab: Tab, is_answering: bool):
    """Draw a growing answer and the notices; after the end of an answer draw the whole page."""
    is_last = not tab.is_answering
    if is_answering:
        draw_growing_round(tab)
        st.button("⏹ 停止 Stop", on_click=tab.stop, shortcut="Esc", key="escape")
    for notice in tab.chat.notices:
        st.info(to_markdown(notice, "streamlit"))
    keep(tab)
    if is_answering and is_last:
        st.rerun()


def draw_growing_round(tab: Tab):
    query, answer, remark = [*tab.chat.rounds[tab.number :], (tab.chat.query, "…", "")][0]
    with st.chat_message("user"):
        st.text(query)
    with st.chat_message("assistant"):
        st.markdown(to_markdown(answer, "streamlit"))
        st.markdown(f":small[{remark}]")


def draw_edit(tab: Tab):
    st.info(EDITING.format(tab.editing + 1))
    args = (tab,)
    st.button("取消 Cancel", on_click=give_up_edit, args=args, shortcut="Esc", key="escape")


def draw_welcome():
    st.markdown(f"#### {WELCOME}")
    for text in EXAMPLES:
        st.button(text, on_click=state.update, kwargs={"question": text})


def draw(shared: SharedModel, title: str):
    """Draw the page; Streamlit calls this after each event.

    A growing answer is drawn by repeated runs of its part of the page alone, so that other events
    do not end it, and no button of an earlier run waits for its end.
    """
    tab = state.setdefault("tab", Tab())
    stop_with_session(tab)
    if tab.chat.query and not tab.is_answering:  # no answer: back into the text box
        state.box, tab.chat.query = tab.chat.query, ""
    st.set_page_config(page_title=title.split(",")[0], page_icon="💬")
    st.text(title)
    rounds, end = st.container(), st.container()
    conversations = st.sidebar.container()
    with st.sidebar:
        settings = draw_settings(shared, tab)
    if query := draw_box(tab):
        tab.ask(shared, query, **settings)
    is_answering = tab.is_answering
    with conversations:
        draw_conversations(tab)
    with rounds:
        for number, texts in enumerate(tab.chat.rounds[: tab.number if is_answering else None]):
            draw_round(tab, number, *texts)
    with end:
        run_every = INTERVAL_S if is_answering else None
        st.fragment(draw_answer, run_every=run_every)(tab, is_answering)
        if tab.editing is not None:
            draw_edit(tab)
        if not (tab.chat.rounds or is_answering):
            draw_welcome()


arguments = tuple(sys.argv[1:])
if runtime.exists():
    draw(*load_once(arguments, load))
else:
    load_once(arguments, load)
    logins = utils.parse_args(__doc__, utils.add_auth).auth
    app = st.App(__file__, middleware=[Middleware(Login, logins=logins)] if logins else [])
