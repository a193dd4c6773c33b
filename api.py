"""Serve ChatGLM2 with the API of the original: prompt and history in, answer out.

    python api.py --model resources/chatglm2-tiny
    curl -X POST "http://127.0.0.1:8000" -H 'Content-Type: application/json' \\
         -d '{"prompt": "你好", "history": []}'

With `"stream": true` the answer is server-sent events {"delta", "finished"}; the last event also
has the fields of the response.
"""

import json
from datetime import datetime
from typing import Annotated

import utils

if __name__ == "__main__":
    utils.start_script(__doc__, utils.add_server_arguments)

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from chatglm2 import CHAT_DEFAULTS
from chatglm2.serving import pages, schema, server

# Some versions of LangChain's client send a history without questions.
Round = Annotated[list[schema.Text | None], Field(min_length=2, max_length=2, fail_fast=True)]
History = Annotated[list[Round], Field(max_length=schema.MAX_MESSAGES, fail_fast=True)]


class Question(schema.StrictTypes):
    prompt: schema.Text
    history: History | None = None
    max_length: schema.Count | None = None
    top_p: schema.real(0, 1) = None
    temperature: schema.real(0, convert=schema.round_temperature) = None
    stream: bool | None = None


class Answer(BaseModel):
    response: str
    history: list[Round]
    status: int
    time: str


class AnyContentType:
    """ASGI middleware: a body is JSON, whatever its content type, as for the original.

    curl without `-H` calls it a form. Pages of other sites can send that too, but `SiteGuard`
    refuses their origins.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = scope.get("headers", [])
        headers = [(name, value) for name, value in headers if name != b"content-type"]
        await self.app(scope | {"headers": headers}, receive, send)


def encode(tokenizer, question: Question) -> list[int]:
    history = [(query or "", answer or "") for query, answer in question.history or []]
    return tokenizer.encode(tokenizer.build_prompt(question.prompt, history))


def complete(question: Question, text: str) -> dict:
    history = [*(question.history or []), [question.prompt, text]]
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return {"response": text, "history": history, "status": 200, "time": now}


async def stream(question: Question, answers: server.Answers):
    """Yield the events of an answer."""
    text = ""
    try:
        async for _, chunk in answers:
            text += chunk.text
            if chunk.text:
                yield server.event(json.dumps({"delta": chunk.text, "finished": False}))
    except Exception as error:  # the status 200 is sent already: an event reports the error
        yield server.error_event(error)
    else:
        yield server.event(json.dumps({"delta": "", "finished": True} | complete(question, text)))


def create_app(model, tokenizer, args) -> FastAPI:
    options = {"invalid_status": 422, "strict_content_type": False}
    app = server.create_app(model, tokenizer, args, "ChatGLM2", **options)
    app.add_middleware(AnyContentType)
    pages.add_pages(app, args, "/", {"prompt": "你好", "history": []})
    responses = {200: {"content": {"text/event-stream": {}}}, **server.ERROR_RESPONSES}

    @app.post("/", response_model=Answer, responses=responses)
    async def ask(question: Question, request: HTTPRequest):
        ids = await run_in_threadpool(encode, tokenizer, question)
        wanted = server.build_request(
            question,
            ids,
            max_length=question.max_length or CHAT_DEFAULTS["max_length"],
            process_text=model.process_response,
        )
        answers = server.Answers(request, [wanted], "prompt")
        if question.stream:
            return server.EventStream(stream(question, answers), answers)
        (answer,) = await answers.collect()
        return complete(question, answer.text)

    return app


def main(argv=None):
    args = utils.parse_args(__doc__, utils.add_server_arguments, argv)
    listener = server.bind(args)
    tokenizer, model = utils.load_model(args)
    server.run(create_app(model, tokenizer, args), args, listener)


if __name__ == "__main__":
    utils.run_script(main)
