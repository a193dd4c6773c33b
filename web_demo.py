"""Chat with ChatGLM2 in the browser, with Gradio.

    python web_demo.py --model resources/chatglm2-tiny

Then open http://127.0.0.1:7860.
"""

import argparse
import os
import weakref

import gradio as gr
from fastapi.middleware import Middleware

import utils
from chatglm2.chat.markdown import to_markdown
from chatglm2.chat.shared_model import EXAMPLES, WELCOME, Chat, SharedModel, sampling_sliders
from chatglm2.errors import one_line
from chatglm2.hardware import listen
from chatglm2.loading import describe
from chatglm2.serving.guards import SiteGuard, list_hosts

MAX_WAITING = 16  # questions that wait, each in a thread; further ones wait in Gradio's queue
FONTS = ["Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
LATEX = [
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]
HEAD = """
<style>.katex-display {overflow-x: auto; overflow-y: hidden}</style>
<!-- No text can make the browser send a request to another host. -->
<meta http-equiv="Content-Security-Policy"
    content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">"""
LOOK = {
    "theme": gr.themes.Default(primary_hue="blue", font=FONTS),
    "footer_links": ["settings"],
    "head": HEAD,
}


def draw(chat: Chat) -> tuple[list[dict], str]:
    """Return the chatbot's messages and the notice."""
    rounds = [*chat.rounds, (chat.query, "…")] if chat.query else chat.rounds
    messages = [
        {"role": role, "content": [{"type": "text", "text": to_markdown(text, "gradio")}]}
        for texts in rounds
        for role, text in zip(("user", "assistant"), texts, strict=True)
    ]
    return messages, to_markdown("\n".join(chat.notices), "gradio")


class Handlers:
    """The handlers of the page's events. Each browser tab has its own chat."""

    def __init__(self, model, tokenizer):
        self.shared = SharedModel(model, tokenizer)
        self.chats = weakref.WeakValueDictionary()  # by session hash: one for each browser tab

    def respond(self, query, chat, max_length, top_p, temperature, draft, request: gr.Request):
        """Answer: yield messages, notice, text box, chat, and a question to give back."""
        if not query.strip():
            return
        chat = chat or self.shared.start_chat()
        chat.end_answer()
        self.chats[request.session_hash] = chat
        settings = {"max_length": max_length, "top_p": top_p, "temperature": temperature}
        emptied = {"value": ""} if draft == query else {}  # a retry or an example keeps the draft
        box, waiting = gr.Textbox(submit_btn=False, stop_btn=True, **emptied), ""
        with chat.busy(self.shared.answer(chat, query, **settings)) as steps:
            for _ in steps:
                if not chat.notice or chat.notice != waiting:
                    yield *draw(chat), box, chat, ""
                    box, waiting = gr.skip(), chat.notice
            query, chat.query = chat.query, ""
            yield *draw(chat), gr.Textbox(submit_btn=True, stop_btn=False), chat, query

    def give_back(self, query, draft) -> str:
        return "\n".join(filter(None, (query, draft)))

    def pick(self, event: gr.SelectData) -> str:
        return event.value["text"]

    def undo(self, chat, draft):
        query = chat.pop()
        return *draw(chat), draft or query

    def clear(self, chat):
        if chat:
            chat.clear()
        return [], ""

    def stop(self, chat):
        chat.is_stopped = True

    def leave(self, request: gr.Request):
        if chat := self.chats.pop(request.session_hash, None):
            chat.leave()


def build_demo(model, tokenizer, name: str) -> gr.Blocks:
    """Return the page; `name` is the name of the model."""
    with gr.Blocks(title="ChatGLM2-6B", fill_height=True, analytics_enabled=False) as demo:
        with gr.Row():
            gr.Markdown(f"## ChatGLM2-6B\n{describe(name, model)}")
            clear = gr.Button("清空对话 Clear history", size="sm", scale=0, min_width=150)
        chatbot = gr.Chatbot(
            show_label=False,
            scale=1,
            placeholder=WELCOME,
            examples=[{"text": text} for text in EXAMPLES],
            latex_delimiters=LATEX,
            buttons=["copy"],
            feedback_options=None,
        )
        notice = gr.Markdown()
        box = gr.Textbox(
            placeholder="输入问题，回车发送 / Type a message",
            show_label=False,
            autofocus=True,
            submit_btn=True,
        )
        with gr.Accordion("参数设置 Settings", open=False), gr.Row():
            settings = [gr.Slider(**slider) for slider in sampling_sliders(model).values()]
        connect(demo, Handlers(model, tokenizer), chatbot, notice, box, clear, settings)
    return demo


def connect(demo, handlers, chatbot, notice, box, clear, settings):
    """Connect each event of the page with its handler."""
    chat, query, unanswered = gr.State(), gr.State(), gr.State()
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    slow = {**quick, "concurrency_id": "answer", "concurrency_limit": MAX_WAITING}
    chatbot.undo(handlers.undo, [chat, box], [chatbot, notice, box], **quick)
    retry = chatbot.retry(Chat.pop, chat, query, **quick)
    example = chatbot.example_select(handlers.pick, None, query, **quick)
    outputs = [chatbot, notice, box, chat, unanswered]
    for trigger, asked in ((box.submit, box), (retry.then, query), (example.then, query)):
        answer = trigger(handlers.respond, [asked, chat, *settings, box], outputs, **slow)
        answer.then(handlers.give_back, [unanswered, box], box, **quick)
    gr.on([chatbot.clear, clear.click], handlers.clear, chat, [chatbot, notice], **quick)
    box.stop(handlers.stop, chat, queue=False, **quick)
    demo.unload(handlers.leave)


def check_address(host: str, port: int | None):
    """Exit if the address cannot be used; let this process reach its own server without a proxy."""
    try:
        listen(host, port or 0).close()
    except OSError as error:
        raise SystemExit(cannot_serve(host, port, error)) from error
    for name in ("no_proxy", "NO_PROXY"):
        hosts = (os.environ.get(name), "127.0.0.1", "localhost", host)
        os.environ[name] = ",".join(filter(None, hosts))


def cannot_serve(host: str, port: int | None, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or one_line(error)
    where = f"--port {port}" if port else "any port from 7860 to 7959"
    return f"cannot serve at --host {host}, {where}: {reason}; choose another --host or --port"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    server.add_argument(
        "--port", type=utils.number(int, 1, 65535), help="default: the first free one from 7860 on"
    )
    server.add_argument(
        "--share", action="store_true", help="make a public link through Gradio's site"
    )
    utils.add_allowed_host(server)
    utils.add_model_arguments(parser)
    args = parser.parse_args(argv)
    check_address(args.host, args.port)
    tokenizer, model = utils.load_model(args)
    # Gradio checks origins, but serves sites that let their name mean 127.0.0.1. A public link has
    # a name that is not known yet.
    hosts = None if args.share else list_hosts(args.host, args.allowed_host)
    guards = [Middleware(SiteGuard, hosts=hosts, origins=["*"])]
    server = {"server_name": args.host, "server_port": args.port, "share": args.share}
    server["app_kwargs"] = {"middleware": guards}
    try:
        build_demo(model, tokenizer, args.model).launch(**server, **LOOK)
    except OSError as error:
        raise SystemExit(cannot_serve(args.host, args.port, error)) from error


if __name__ == "__main__":
    utils.run_script(main)
