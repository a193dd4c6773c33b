"""Chat with ChatGLM2 in the browser, with Gradio.

    python web_demo.py --model resources/chatglm2-tiny

Then open http://127.0.0.1:7860.
"""

import asyncio
import os
import uuid
from contextlib import aclosing
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.start_script(__doc__, utils.add_page_arguments)

import gradio as gr
from fastapi.middleware import Middleware

from chatglm2.chat import gradio_page
from chatglm2.chat.gradio_page import LOOK, list_conversations, show_chat
from chatglm2.chat.markdown import to_markdown
from chatglm2.chat.saved import read_chat, read_file, save_chat
from chatglm2.chat.shared_model import (
    EDITING,
    EXAMPLES,
    INTERVAL_S,
    WELCOME,
    Chat,
    SharedModel,
    sampling_sliders,
)
from chatglm2.errors import one_line
from chatglm2.hardware import listen
from chatglm2.loading import describe
from chatglm2.serving.guards import SiteGuard, list_hosts

ASKING = {"submit_btn": False, "stop_btn": True}  # the buttons of the text box
IDLE = {"submit_btn": True, "stop_btn": False}


class Page:
    """The page and the handlers of its events.

    A conversation lives in the browser, in the value of `self.conversations`: each event brings it
    along. Here are only the chats that are being answered.
    """

    def __init__(self, model, tokenizer, name: str):
        name = Path(name).resolve().name
        self.shared = SharedModel(model, tokenizer)
        self.chats: dict[str, Chat] = {}  # by session hash: one for each browser tab
        self.replacing: dict[str, dict] = {}  # what the last step of such an answer draws instead
        with gr.Blocks(title=name, fill_height=True, analytics_enabled=False) as self.demo:
            self.build(model, name)
            self.connect()

    def build(self, model, name: str):
        with gr.Sidebar(label="对话与设置 Conversations and settings", open=False):
            self.new = gr.Button("新对话 New chat", variant="primary")
            self.conversations = list_conversations()
            with gr.Accordion("导入导出 Import, export", open=False):
                self.export_markdown = gr.Button("导出 Markdown", size="sm")
                self.export_json = gr.Button("导出 JSON", size="sm")
                gr.HTML(gradio_page.IMPORT)
            with gr.Accordion("参数设置 Settings", open=False):
                self.system = gr.Textbox(label="系统提示 System prompt", lines=2, max_lines=6)
                self.sliders = {
                    name: gr.Slider(**slider) for name, slider in sampling_sliders(model).items()
                }
        gr.Markdown(f"# {describe(name, model)}", elem_id="title")
        self.chatbot = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            placeholder=WELCOME,
            examples=[{"text": text} for text in EXAMPLES],
            latex_delimiters=gradio_page.LATEX,
            buttons=[],
            feedback_options=None,
            autoscroll=False,
        )
        self.notice = gr.Markdown()
        self.box = gr.Textbox(
            placeholder="输入问题，回车发送 / Type a message",
            label="问题 Message",
            show_label=False,
            autofocus=True,
            max_lines=8,
            **IDLE,
        )
        self.nothing = {self.box: gr.skip()}  # what a handler returns that changes nothing

    def connect(self):
        """Connect each event of the page with its handler."""
        shown = [self.chatbot, self.notice, self.box, self.conversations, self.system]
        inputs = {self.box, self.conversations, self.system, *self.sliders.values()}
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        slow = {**quick, "concurrency_id": "answer", "concurrency_limit": None}
        for trigger, handler in (
            (self.box.submit, self.submit),
            (self.chatbot.retry, self.retry),
            (self.chatbot.example_select, self.pick),
        ):
            trigger(handler, inputs, shown, **slow).then(self.give_back, inputs, shown, **quick)
        for trigger, handler in (
            (self.chatbot.undo, self.undo),
            (self.chatbot.clear, self.clear),
            (self.conversations.edit, self.edit),
            (self.conversations.input, self.show),
            (self.conversations.upload, self.read_file),
        ):
            trigger(handler, inputs, shown, **quick)
        for trigger, function, handler in (
            (self.demo.load, "load", self.show_first),
            (self.new.click, "fresh", self.show),
        ):
            fetched = trigger(None, None, self.conversations, js=f"conversations.{function}")
            fetched.then(handler, inputs, shown, **quick)
        self.export_markdown.click(None, js="conversations.exportMarkdown")
        self.export_json.click(None, js="conversations.exportJson")
        self.box.stop(self.stop, queue=False, **quick)
        self.demo.unload(self.stop)

    # Handlers. Each gets the values of all inputs, and returns the values of some components.

    async def answer(self, query: str, chat: Chat, values: dict, request: gr.Request):
        """Draw each step of an answer; a question without an answer is left to `give_back`."""
        if not query.strip():
            yield self.nothing  # without any step Gradio would empty all components
            return
        await self.leave(request)
        self.chats[request.session_hash] = chat
        saved = values[self.conversations]
        values = {**values, self.conversations: {**saved, "id": saved["id"] or uuid.uuid4().hex}}
        settings = {name: values[slider] for name, slider in self.sliders.items()}
        box = gr.Textbox(**ASKING, **({"value": ""} if values[self.box] == query else {}))
        try:
            async with aclosing(self.shared.answer(chat, query, **settings)) as steps:
                async for _ in steps:
                    yield {**self.draw(chat, values), self.box: box}
                    box = gr.skip()
            query, chat.query = chat.query, ""
            drawn = {**self.draw(chat, values), self.box: gr.Textbox(**IDLE)}
            drawn[self.conversations]["query"] = query  # for `give_back`
        finally:
            del self.chats[request.session_hash]
            replacement = self.replacing.pop(request.session_hash, None)
        yield replacement or drawn

    async def submit(self, values, request: gr.Request):
        saved = values[self.conversations]
        chat = read_chat(saved, values[self.system])
        if (editing := saved.get("editing")) is not None:
            chat.cut(editing)
        async for step in self.answer(values[self.box], chat, values, request):
            yield step

    async def retry(self, values, request: gr.Request):
        chat = read_chat(values[self.conversations], values[self.system])
        async for step in self.answer(chat.cut(-1), chat, values, request):
            yield step

    async def pick(self, values, event: gr.SelectData, request: gr.Request):
        chat = read_chat(values[self.conversations], values[self.system])
        async for step in self.answer(event.value["text"], chat, values, request):
            yield step

    def give_back(self, values):
        """Put a question without an answer back into the text box."""
        saved = values[self.conversations]
        if not saved.get("query"):
            return self.nothing
        texts = filter(None, (saved["query"], values[self.box]))
        return {self.box: "\n".join(texts), self.conversations: {**saved, "query": ""}}

    def undo(self, values):
        chat = read_chat(values[self.conversations], values[self.system])
        query = chat.cut(-1)
        return {**self.draw(chat, values), self.box: values[self.box] or query}

    def edit(self, values, event: gr.EventData):
        """Put an earlier question into the text box; sending it replaces what follows."""
        saved, index = values[self.conversations], event.index
        if index is None:
            return {self.notice: "", self.box: "", self.conversations: {**saved, "editing": None}}
        return {
            self.notice: EDITING.format(index + 1),
            self.box: saved["rounds"][index][0],
            self.conversations: {**saved, "editing": index},
        }

    def show_first(self, values, request: gr.Request):
        """Draw the conversation that the browser kept, unless a question was asked meanwhile."""
        is_answering = request.session_hash in self.chats
        return self.nothing if is_answering else self.show(values, request)

    def show(self, values, request: gr.Request):
        """Draw the conversation that the browser has picked."""
        saved = values[self.conversations]
        chat = read_chat(saved)
        box = gr.Textbox(**IDLE, **({"value": saved["query"]} if saved.get("query") else {}))
        return self.replace(
            {**self.draw(chat, values), self.box: box, self.system: chat.system}, request
        )

    def clear(self, values, request: gr.Request):
        drawn = self.draw(Chat(system=values[self.system]), values)
        return self.replace({**drawn, self.box: gr.Textbox(**IDLE)}, request)

    def read_file(self, values, event: gr.EventData, request: gr.Request):
        try:
            chat = read_file(event.text)
        except ValueError as error:
            gr.Warning(str(error), title="导入失败 Import failed")
            return self.nothing
        drawn = self.draw(chat, {self.conversations: {"id": uuid.uuid4().hex}})
        box = {self.box: gr.Textbox(**IDLE), self.system: chat.system}
        return self.replace({**drawn, **box}, request)

    def replace(self, drawn: dict, request: gr.Request) -> dict:
        """End the answer that is being given, and draw something else.

        The answer draws it with its last step: the order of two events is not certain.
        """
        if request.session_hash not in self.chats:
            return drawn
        self.replacing[request.session_hash] = drawn
        self.stop(request)
        return self.nothing

    def stop(self, request: gr.Request):
        if chat := self.chats.get(request.session_hash):
            chat.is_stopped = True

    async def leave(self, request: gr.Request):
        """End the answer that is being given, before another one begins."""
        self.stop(request)
        while request.session_hash in self.chats:
            await asyncio.sleep(INTERVAL_S)

    def draw(self, chat: Chat, values: dict) -> dict:
        return {
            self.chatbot: show_chat(chat),
            self.notice: to_markdown("\n".join(chat.notices), "gradio"),
            self.conversations: {**save_chat(chat), "id": values[self.conversations]["id"]},
        }


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
    args = utils.parse_args(__doc__, utils.add_page_arguments, argv)
    check_address(args.host, args.port)
    tokenizer, model = utils.load_model(args)
    # Gradio checks origins, but serves sites that let their name mean 127.0.0.1. A public link has
    # a name that is not known yet.
    hosts = None if args.share else list_hosts(args.host, args.allowed_host)
    guards = [Middleware(SiteGuard, hosts=hosts, origins=["*"])]
    server = {"server_name": args.host, "server_port": args.port, "share": args.share}
    server |= {"auth": args.auth, "app_kwargs": {"middleware": guards}}
    try:
        Page(model, tokenizer, args.model).demo.launch(**server, **LOOK)
    except OSError as error:
        raise SystemExit(cannot_serve(args.host, args.port, error)) from error


if __name__ == "__main__":
    utils.run_script(main)
