"""Chat with ChatGLM2 in the browser, with Streamlit.

    streamlit run web_demo2.py -- --model resources/chatglm2-tiny

Then open http://127.0.0.1:8501. Streamlit's own options, such as --server.port, stand before the
`--`; those of this script after it.
"""

import argparse
import sys

import streamlit as st
from streamlit import runtime

import utils
from chatglm2.chat.conversation import Conversation
from chatglm2.chat.markdown import to_markdown
from chatglm2.chat.shared_model import (
    EXAMPLES,
    WELCOME,
    Answering,
    Chat,
    SharedModel,
    sampling_sliders,
)
from chatglm2.loading import describe

TITLE = "ChatGLM2-6b 演示"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="streamlit run web_demo2.py --", description=__doc__.partition("\n")[0]
    )
    utils.add_model_arguments(parser)
    return parser.parse_args(argv)


@st.cache_resource(show_spinner="模型加载中 Loading the model")
def load(argv: tuple[str, ...]) -> tuple[SharedModel, Answering, str]:
    """Load the model, once for all browsers; return it, its thread and a line that describes it."""
    args = parse_args(argv)
    tokenizer, model = utils.load_model(args)
    return SharedModel(model, tokenizer), Answering(), describe(args.model, model)


def leave(chat: Chat):
    chat.is_stopped = True


@st.cache_resource(scope="session", show_spinner=False, on_release=leave)
def leave_with_session(_chat: Chat) -> Chat:
    """Make Streamlit call `leave` when the tab is closed; it drops the session itself later."""
    return _chat


def draw(role: str, text: str):
    """Draw a message and return its place."""
    with st.chat_message(role):
        place = st.empty()
        place.markdown(to_markdown(text, "streamlit"))
    return place


def draw_chat(chat: Chat, is_answering: bool):
    for number, (query, answer, _) in enumerate(chat.rounds, 1):
        draw("user", query)
        draw("assistant", answer)
        if number == chat.first_round:
            st.caption(Conversation.DROPPED.format(number))
    if chat.query and not is_answering:
        draw("user", chat.query)
    if chat.notice:
        st.info(to_markdown(chat.notice, "streamlit"))


def draw_welcome():
    st.markdown(f"#### {WELCOME}")
    for text in EXAMPLES:
        st.button(text, on_click=st.session_state.update, kwargs={"example": text})


def clear(chat: Chat, answering: Answering):
    answering.end(chat)
    chat.cut(0)
    chat.query = chat.notice = ""


def draw_sidebar(shared, answering, chat: Chat, description: str, is_answering: bool) -> dict:
    """Draw title and settings; return the settings, which cannot be changed during an answer."""
    with st.sidebar:
        st.title(TITLE)
        st.caption(description)
        settings = {
            name: st.slider(*slider.values(), key=name, disabled=is_answering)
            for name, slider in sampling_sliders(shared.model).items()
        }
        st.button(
            "🗑 清空对话 Clear history", on_click=clear, args=(chat, answering), width="stretch"
        )
    return settings


def answer(shared: SharedModel, answering: Answering, chat: Chat, query: str, settings: dict):
    """Draw a question and its growing answer, until it ends or another run of the script ends it.

    Each click of the user starts another run while this one goes on.
    """
    draw("user", query)
    place = draw("assistant", "…")
    st.button("⏹ 停止 Stop")
    with answering.run(chat, shared.answer(chat, query, **settings)) as steps:
        for _ in steps:
            text = chat.notice if chat.query else chat.rounds[-1][1]
            # Not st.write_stream: new text may change how the text before it is drawn.
            place.markdown(to_markdown(text or "…", "streamlit"))


def main():
    if not runtime.exists():
        command = __doc__.splitlines()[2]
        raise SystemExit(f"请用 streamlit 启动 / start it with streamlit:\n\n{command}\n")
    st.set_page_config(page_title=TITLE, page_icon="💬")
    try:
        shared, answering, description = load(tuple(sys.argv[1:]))
    except SystemExit as error:  # argparse has written its message to the terminal
        is_usage = isinstance(error.code, int)
        st.error(
            "命令行参数有误，见终端 / wrong arguments, see the terminal" if is_usage else error.code
        )
        st.stop()
    if "chat" not in st.session_state:
        st.session_state.chat = Chat()
    chat = st.session_state.chat
    leave_with_session(chat)
    answering.end(chat)  # the previous run may still be drawing one
    example = st.session_state.pop("example", None)
    query = st.chat_input("请在这儿输入您的命令 / Type a message") or example
    settings = draw_sidebar(shared, answering, chat, description, is_answering=bool(query))
    if query:
        chat.query, chat.notice = query, ""  # kept even if this run ends before it answers
    draw_chat(chat, is_answering=bool(query))
    if chat.query and not query:  # stopped while it waited, too long, or failed
        st.button(
            "再问一次 Ask again", on_click=st.session_state.update, kwargs={"example": chat.query}
        )
    if not (chat.rounds or chat.query or query):
        draw_welcome()
    if query:
        answer(shared, answering, chat, query, settings)
        st.rerun()


main()
