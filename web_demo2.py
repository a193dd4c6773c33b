"""Chat with ChatGLM2 in the browser, with Streamlit.

    streamlit run web_demo2.py -- --model resources/chatglm2-tiny

Then open http://127.0.0.1:8501. Streamlit's own options, such as --server.port, stand before the
`--`; those of this script after it.
"""

import argparse
import sys
import threading

import streamlit as st
from streamlit import runtime

import utils
from chatglm2.chat.conversation import DROPPED
from chatglm2.chat.markdown import to_markdown
from chatglm2.chat.shared_model import EXAMPLES, WELCOME, Chat, SharedModel, sampling_sliders

TITLE = "ChatGLM2-6b 演示"
COMMAND = "streamlit run web_demo2.py -- --model resources/chatglm2-tiny"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="streamlit run web_demo2.py --")
    utils.add_model_arguments(parser)
    return parser.parse_args(argv)


@st.cache_resource(show_spinner="模型加载中 Loading the model")
def load(argv: tuple[str, ...]) -> tuple[SharedModel, str]:
    """Load the model, once for all browsers; return it and a line that describes it."""
    args = parse_args(argv)
    tokenizer, model = utils.load_model(args)
    return SharedModel(model, tokenizer), utils.describe(args.model, model)


def leave(chat: Chat):
    threading.Thread(target=chat.leave).start()  # to wait here would keep the server waiting


@st.cache_resource(scope="session", show_spinner=False, on_release=leave)
def leave_with_session(_chat: Chat) -> Chat:
    """Have `leave` called when the browser's tab is closed; its session stays a while longer."""
    return _chat


def draw(role: str, text: str):
    """Draw a message and return its place."""
    with st.chat_message(role):
        place = st.empty()
        place.markdown(to_markdown(text, "streamlit"))
    return place


def draw_chat(chat: Chat, is_answering: bool):
    for number, (query, answer) in enumerate(chat.rounds, 1):
        draw("user", query)
        draw("assistant", answer)
        if number == chat.first_round:
            st.caption(DROPPED.format(number))
    if chat.query and not is_answering:
        draw("user", chat.query)
    if chat.notice:
        st.info(to_markdown(chat.notice, "streamlit"))


def draw_welcome():
    st.markdown(f"#### {WELCOME}")
    for text in EXAMPLES:
        st.button(text, on_click=st.session_state.update, kwargs={"example": text})


def draw_sidebar(chat: Chat, description: str, is_answering: bool) -> dict:
    """Draw title and settings; return the settings. To change one would end an answer."""
    with st.sidebar:
        st.title(TITLE)
        st.caption(description)
        settings = {
            name: st.slider(*slider.values(), key=name, disabled=is_answering)
            for name, slider in sampling_sliders(chat.model).items()
        }
        st.button("🗑 清空对话 Clear history", on_click=chat.clear, width="stretch")
    return settings


def answer(shared: SharedModel, chat: Chat, query: str, settings: dict):
    """Draw a question and its growing answer, until it ends or another run of the script ends it.

    Whatever the user clicks on starts another run, beside this one.
    """
    draw("user", query)
    place = draw("assistant", "…")
    st.button("⏹ 停止 Stop")
    with chat.busy(shared.answer(chat, query, **settings)) as steps:
        for _ in steps:
            text = chat.notice if chat.query else chat.rounds[-1][1]
            # Not st.write_stream: a piece may change how the text before it is drawn.
            place.markdown(to_markdown(text or "…", "streamlit"))


def main():
    if not runtime.exists():
        raise SystemExit(f"请用 streamlit 启动 / start it with streamlit:\n\n    {COMMAND}\n")
    st.set_page_config(page_title=TITLE, page_icon="💬")
    try:
        shared, description = load(tuple(sys.argv[1:]))
    except SystemExit as error:  # argparse has written its message to the terminal
        is_usage = isinstance(error.code, int)
        st.error(
            "命令行参数有误，见终端 / wrong arguments, see the terminal" if is_usage else error.code
        )
        st.stop()
    if "chat" not in st.session_state:
        st.session_state.chat = shared.start_chat()
    chat = st.session_state.chat
    leave_with_session(chat)
    chat.end_answer()  # of the run before, which goes on for a moment
    example = st.session_state.pop("example", None)
    query = st.chat_input("请在这儿输入您的命令 / Type a message") or example
    settings = draw_sidebar(chat, description, is_answering=bool(query))
    if query:
        chat.query, chat.notice = query, ""  # also if this run is ended before it answers
    draw_chat(chat, is_answering=bool(query))
    if chat.query and not query:  # it waited and was stopped, was too long or failed
        st.button(
            "再问一次 Ask again", on_click=st.session_state.update, kwargs={"example": chat.query}
        )
    if not (chat.rounds or chat.query or query):
        draw_welcome()
    if query:
        answer(shared, chat, query, settings)
        st.rerun()


main()
