"""The handlers of /v1/responses: answers, their events, and responses that can be continued."""

import json
import time
import uuid
from bisect import bisect_left
from collections import defaultdict
from contextlib import contextmanager
from typing import Annotated, Literal, NamedTuple

from fastapi import Query, Response
from fastapi import Request as HTTPRequest
from openai.types.responses import ResponseError, ResponseUsage
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from . import server
from .batching import Chunk, Generation, InvalidRequest, Request
from .errors import RequestError
from .responses import describe_tokens
from .responses_schema import (
    DeletedResponse,
    InputItem,
    InputItems,
    ItemReference,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponsesRequest,
    TextPart,
)
from .schema import Message

MAX_STORED = 1000  # responses of each client
MAX_STORED_BYTES = 64_000_000  # of the responses and conversations of each client
MAX_ITEMS = 100  # in a page of input items
MAX_ANSWER_ROOM = 512  # tokens that a shortened conversation leaves for an answer
TEXT = {"format": {"type": "text"}, "verbosity": "medium"}
ECHOED = ResponsesRequest.model_fields.keys() & ResponseObject.model_fields.keys()
ECHOED -= {"text", "temperature", "top_p", "service_tier"}


def as_json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


@contextmanager
def renaming():
    """Name the field for a JSON schema in errors as it is called on this route."""
    try:
        yield
    except InvalidRequest as error:
        message = str(error).replace("response_format", "text.format", 1)
        raise InvalidRequest(message, "text") from error


def describe_item(id: str, role: str, content: str) -> InputItem | OutputMessage:
    """Return a message of a conversation as an item."""
    if role == "assistant":
        return OutputMessage(id=id, status="completed", content=[OutputText(text=content)])
    return InputItem(id=id, role=role, content=[TextPart(type="input_text", text=content)])


class Stored(NamedTuple):
    """A response, the messages before its answer without the instructions, its answer: as JSON."""

    response: bytes
    conversation: bytes
    answer: bytes


class ResponseStore:
    """Responses of one client, in memory; the least recently used are dropped first."""

    def __init__(self):
        self.kept: dict[str, Stored] = {}
        self.num_bytes = 0

    def add(self, id: str, stored: Stored):
        if (size := sum(map(len, stored))) > MAX_STORED_BYTES:
            return
        self.kept[id] = stored
        self.num_bytes += size
        while len(self.kept) > MAX_STORED or self.num_bytes > MAX_STORED_BYTES:
            self.remove(next(iter(self.kept)))

    def find(self, id: str, param: str) -> Stored:
        """Return a response, which counts as used; `param` is the field that has its id."""
        # The only item in the output of a response has the same key.
        response_id = id.replace("msg_", "resp_", 1) if param == "input" else id
        if response_id not in self.kept:
            message = f"{param}: {id[:80]!r} is not stored; the least recently used are dropped."
            code = f"{param.removesuffix('_id')}_not_found"
            raise RequestError(404, message, param, code)
        self.kept[response_id] = stored = self.kept.pop(response_id)
        return stored

    def remove(self, id: str):
        self.num_bytes -= sum(map(len, self.kept.pop(id)))

    def read_conversation(self, body: ResponsesRequest) -> list[dict]:
        """Return the messages before and in the input of a request."""
        messages = []
        if body.previous_response_id is not None:
            stored = self.find(body.previous_response_id, "previous_response_id")
            messages = [*json.loads(stored.conversation), json.loads(stored.answer)]
        if isinstance(body.input, str):
            return [*messages, {"role": "user", "content": body.input}]
        for item in body.input:
            if isinstance(item, ItemReference):
                messages.append(json.loads(self.find(item.id, "input").answer))
            else:
                messages.append({"role": item.role, "content": item.read_text()})
        return messages


class Draft:
    """A response that is being written, and its events.

    Attributes:
        part: The only part of the only item of its output.
    """

    def __init__(self, body: ResponsesRequest, generation: Generation, tokenizer):
        self.generation, self.tokenizer = generation, tokenizer
        self.num_tokens = self.num_events = 0
        key, sampling = uuid.uuid4().hex, generation.request
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        self.part, self.message = OutputText(), OutputMessage(id=f"msg_{key}")
        self.response = ResponseObject(
            id=f"resp_{key}",
            created_at=int(time.time()),
            text=TEXT | text,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **body.model_dump(include=ECHOED, exclude_none=True),
        )

    def add(self, chunk: Chunk):
        self.message.content = [self.part]
        self.part.text += chunk.text
        self.part.logprobs += describe_tokens(self.tokenizer, chunk.logprobs)
        self.num_tokens += len(chunk.token_ids)

    def end(self, finish_reason: str):
        response, is_whole = self.response, finish_reason == "stop"
        response.output = [self.message]
        response.status = self.message.status = "completed" if is_whole else "incomplete"
        if is_whole:
            response.completed_at = int(time.time())
        else:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        generation = self.generation
        response.usage = ResponseUsage(
            input_tokens=generation.prompt_length,
            input_tokens_details=InputTokensDetails(
                cached_tokens=generation.num_cached, cache_write_tokens=0
            ),
            output_tokens=self.num_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
            total_tokens=generation.prompt_length + self.num_tokens,
        )

    # Events; the order is OpenAI's.

    def event(self, kind: str, **fields) -> str:
        name = f"response.{kind}"
        data = {"type": name, "sequence_number": self.num_events, **fields}
        self.num_events += 1
        return f"event: {name}\n{server.event(to_json(data).decode())}"

    def part_event(self, kind: str, **fields) -> str:
        place = {"item_id": self.message.id, "output_index": 0, "content_index": 0}
        return self.event(kind, **place, **fields)

    def begin(self):
        yield self.event("created", response=self.response)
        yield self.event("in_progress", response=self.response)

    def write(self, chunk: Chunk):
        """Add a chunk, and yield its events."""
        if not self.message.content:
            yield self.event("output_item.added", output_index=0, item=self.message)
            yield self.part_event("content_part.added", part=self.part)
        num_known = len(self.part.logprobs)
        self.add(chunk)
        if chunk.text or chunk.logprobs:
            logprobs = self.part.logprobs[num_known:]
            yield self.part_event("output_text.delta", delta=chunk.text, logprobs=logprobs)

    def finish(self):
        """Yield the events after `end`."""
        part = self.part
        yield self.part_event("output_text.done", text=part.text, logprobs=part.logprobs)
        yield self.part_event("content_part.done", part=part)
        yield self.event("output_item.done", output_index=0, item=self.message)
        yield self.event(self.response.status, response=self.response)

    def fail(self, error: Exception) -> str:
        """Return the event of a failed stream; the batcher has logged the cause."""
        failure = json.loads(server.describe_failure(error))["error"]
        code = "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
        self.message.status, self.response.status = "incomplete", "failed"
        self.response.output = [self.message] if self.message.content else []
        self.response.error = ResponseError(
            code=code, message=failure["message"], param=failure["param"]
        )
        return self.event("failed", response=self.response)


class ResponsesApi:
    """The handlers of /v1/responses; `service` encodes prompts and makes the batcher's requests."""

    def __init__(self, service):
        self.service = service
        self.stores = defaultdict(ResponseStore)  # by client

    def find_store(self, request: HTTPRequest) -> ResponseStore:
        return self.stores[request.state.client]

    def encode(self, body: ResponsesRequest, conversation: list[dict]) -> list[int]:
        system = [] if body.instructions is None else [("system", body.instructions)]
        messages = [*system, *((message["role"], message["content"]) for message in conversation)]
        return self.service.encode_chat([Message(role=r, content=text) for r, text in messages])

    def drop_oldest(self, body: ResponsesRequest, conversation: list[dict], limit: int):
        """Drop the oldest messages, so that the prompt has `limit` ids; system messages stay."""
        system = [m for m in conversation if m["role"] in ("system", "developer")]
        others = [m for m in conversation if m["role"] in ("user", "assistant")]

        def fits(first: int) -> bool:
            return len(self.encode(body, system + others[first:])) <= limit

        last = len(others) - 1
        first = bisect_left(range(last), True, key=fits)
        while first < last and others[first]["role"] == "assistant":
            first += 1
        conversation[:] = system + others[first:]

    def build_request(self, body: ResponsesRequest, conversation: list[dict], matcher) -> Request:
        """Return the request for the batcher; a conversation may lose its oldest messages."""
        ids = self.encode(body, conversation)
        if body.truncation == "auto":
            context = self.service.batcher.context
            most = min(context, body.max_length or context)
            limit = most - min(most // 4, body.max_output_tokens or MAX_ANSWER_ROOM)
            if len(ids) > limit:
                # Three quarters, so that some rounds can continue with the kept keys and values.
                self.drop_oldest(body, conversation, limit * 3 // 4)
                ids = self.encode(body, conversation)
        settings = {"process_text": self.service.model.process_response}
        num_logprobs = body.count_logprobs()
        return self.service.build_request(
            body, matcher, ids, 0, num_logprobs=num_logprobs, **settings
        )

    def keep(self, draft: Draft, store: ResponseStore, conversation: list[dict]):
        """Keep a response that ended, unless the client does not want that."""
        if draft.response.store:
            answer = {"role": "assistant", "content": draft.part.text}
            stored = Stored(*map(to_json, (draft.response, conversation, answer)))
            store.add(draft.response.id, stored)

    async def events(self, draft: Draft, answers: server.Answers, *where):
        for event in draft.begin():
            yield event
        try:
            with renaming():
                async for _, chunk in answers:
                    for event in draft.write(chunk):
                        yield event
        except Exception as error:  # the status 200 is sent already: an event reports the error
            yield draft.fail(error)
        else:
            draft.end(chunk.finish_reason)
            self.keep(draft, *where)
            for event in draft.finish():
                yield event
        yield server.event("[DONE]")

    async def create(self, body: ResponsesRequest, request: HTTPRequest):
        """Answer a conversation; its response can be continued by its id."""
        store = self.find_store(request)
        conversation = store.read_conversation(body)
        with renaming():
            matcher = await self.service.compile_schema(body)
            wanted = await run_in_threadpool(self.build_request, body, conversation, matcher)
            answers = server.Answers(request, [wanted], "input")
            draft = Draft(body, *answers.generations, self.service.tokenizer)
            if body.stream:
                return server.EventStream(self.events(draft, answers, store, conversation), answers)
            (whole,) = await answers.collect()
        draft.add(whole)
        draft.end(whole.finish_reason)
        self.keep(draft, store, conversation)
        return as_json(to_json(draft.response))

    async def show(self, response_id: str, request: HTTPRequest, stream: bool = False):
        """Return a stored response."""
        if stream:
            raise RequestError(400, "stream: A stored response is returned whole.", "stream")
        stored = self.find_store(request).find(response_id, "response_id")
        return as_json(stored.response)

    async def list_inputs(
        self,
        response_id: str,
        request: HTTPRequest,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_ITEMS)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ):
        """List the messages that a stored response answers, the last one first."""
        stored = self.find_store(request).find(response_id, "response_id")
        key = response_id.replace("resp_", "msg_", 1)
        items = {f"{key}_{i}": m for i, m in enumerate(json.loads(stored.conversation))}
        ids = list(items if order == "asc" else reversed(items))
        if after is not None and after not in items:
            raise RequestError(404, f"after: {after[:80]!r} is no item of this response.", "after")
        begin = 0 if after is None else ids.index(after) + 1
        page = ids[begin : begin + limit]
        inputs = InputItems(
            data=[describe_item(id, **items[id]) for id in page],
            first_id=page[0] if page else None,
            last_id=page[-1] if page else None,
            has_more=begin + limit < len(ids),
        )
        return as_json(to_json(inputs))

    async def cancel(self, response_id: str):
        """Refuse: only a response that is computed in the background could be cancelled."""
        message = "response_id: Only a response that is computed in the background can be "
        message += "cancelled, and there are none; closing its connection ends an answer."
        raise RequestError(400, message, "response_id")

    async def delete(self, response_id: str, request: HTTPRequest):
        """Delete a stored response."""
        store = self.find_store(request)
        store.find(response_id, "response_id")
        store.remove(response_id)
        return as_json(to_json(DeletedResponse(id=response_id)))
