"""`/v1/responses`: shapes, events, stored responses, and the clients that use it."""

import json
import os
import shutil
import subprocess
import time
from typing import get_args

import jsonschema
import openai
import pydantic
import pytest
from conftest import ROOT
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from servers import check_error, format_request, record_requests, sending, serve, wait_until
from test_readme import blocks

import openai_api
from chatglm2.serving import responses_api

PATH = "/v1/responses"
GREETING = "你好👋！我是 ChatGLM2-tiny，一个小小的演示模型，很高兴见到你，欢迎和我聊聊天。"
HELLO = {"input": "你好", "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "age": {"type": "integer", "maximum": 99}},
    "required": ["ok", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "name": "person", "strict": True, "schema": SCHEMA}
TOOL = {"type": "function", "name": "f", "parameters": {}}
EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}
LONG_STREAM = HELLO | {"stream": True, "ignore_eos": True, "max_output_tokens": 300}


def create(server, **body) -> dict:
    response = server.post(PATH, json=HELLO | body)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    return response.json()


def text_of(response: dict) -> str:
    return response["output"][0]["content"][0]["text"]


def read_events(text: str) -> list[dict]:
    """Return the events of a stream; checks their form, names and numbers."""
    *blocks, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        EVENTS[event["type"]].model_validate(event)
        events.append(event)
    return events


def stream(server, **body) -> list[dict]:
    response = server.post(PATH, json=HELLO | {"stream": True} | body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return read_events(response.text)


def drop_unique(response: dict) -> dict:
    """Return a response without what differs from one to the next."""
    (message,) = response["output"]
    message = {name: value for name, value in message.items() if name != "id"}
    unique = {"id": None, "created_at": 0, "completed_at": 0, "output": [message]}
    details = response["usage"]["input_tokens_details"] | {"cached_tokens": 0}
    return response | unique | {"usage": response["usage"] | {"input_tokens_details": details}}


# A response.


def test_a_response(server, tiny_tokenizer):
    fields = {"metadata": {"a": "b"}, "instructions": "", "model": "any/model"}
    response = create(server, **fields)
    key = response["id"].removeprefix("resp_")
    assert response["object"] == "response" and response["error"] is None
    assert {name: response[name] for name in fields} == fields
    assert (response["temperature"], response["top_p"]) == (0, 0.8)  # the checkpoint's
    assert 0 <= response["completed_at"] - response["created_at"] < 60
    assert abs(response["created_at"] - time.time()) < 60
    part = {"type": "output_text", "text": GREETING, "annotations": [], "logprobs": []}
    message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert response["output"] == [message | {"id": f"msg_{key}"}]
    assert response["status"] == "completed" and response["incomplete_details"] is None
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("\n\n你好"))
    usage, num_tokens = response["usage"], len(tiny_tokenizer.tokenize(GREETING))
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt), num_tokens)
    assert usage["total_tokens"] == len(prompt) + num_tokens
    again = create(server, **fields)["usage"]["input_tokens_details"]
    assert again["cached_tokens"] == len(prompt) - 1


def test_the_input_may_be_items(server, monkeypatch, tiny_tokenizer):
    """Messages of all roles, items of earlier outputs, and references to them."""
    first = create(server, max_output_tokens=3)
    requests = record_requests(server, monkeypatch)
    parts = [{"type": "input_text", "text": "乙"}, {"type": "input_text", "text": "丙"}]
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "丁"}]}
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    items = [
        {"role": "developer", "content": "甲"},
        {"type": "message", "role": "user", "content": parts},
        answer | {"type": "message", "id": "msg_x", "status": "completed"},
        {"role": "user", "content": "你好"},
        *first["output"],
        {"role": "system", "content": "戊"},
        {"role": "user", "content": "你好"},
        reference,
        {"role": "user", "content": "己"},
    ]
    create(server, input=items, instructions="庚", max_output_tokens=1)
    prompt = (
        "[Round 1]\n\n问：庚\n\n甲\n\n戊\n\n乙丙\n\n答：丁\n\n"
        "[Round 2]\n\n问：你好\n\n答：你好👋\n\n"
        "[Round 3]\n\n问：你好\n\n答：你好👋\n\n[Round 4]\n\n问：己\n\n答："
    )
    assert requests[0].input_ids == tiny_tokenizer.encode(prompt)


def test_an_incomplete_response(server):
    response = create(server, max_output_tokens=3)
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None and response["max_output_tokens"] == 3
    assert text_of(response) == "你好👋" and response["usage"]["output_tokens"] == 3
    assert create(server, max_length=20)["usage"]["total_tokens"] == 20


def test_answers_that_are_json(server):
    response = create(server, text={"format": FORMAT})
    jsonschema.validate(json.loads(text_of(response)), SCHEMA)
    assert response["text"] == {"format": FORMAT, "verbosity": "medium"}
    response = create(server, text={"format": {"type": "json_object"}}, max_output_tokens=20)
    assert text_of(response).startswith("{")
    assert text_of(create(server, text={"format": {"type": "text"}})) == GREETING
    assert text_of(create(server, text={"format": None, "verbosity": "medium"})) == GREETING


def test_log_probabilities(server):
    (part,) = create(server, top_logprobs=2, max_output_tokens=3)["output"][0]["content"]
    assert [token["token"] for token in part["logprobs"]] == ["你", "好", "👋"]
    for token in part["logprobs"]:
        likeliest, other = token["top_logprobs"]
        assert (likeliest["token"], likeliest["logprob"]) == (token["token"], token["logprob"])
        assert other["logprob"] < token["logprob"] <= 0
        assert bytes(token["bytes"]).decode() == token["token"]
    included = {"include": ["message.output_text.logprobs"], "max_output_tokens": 3}
    (other,) = create(server, **included)["output"][0]["content"]
    assert [t | {"top_logprobs": []} for t in part["logprobs"]] == other["logprobs"]
    (last,) = stream(server, top_logprobs=2, max_output_tokens=3)[-1]["response"]["output"]
    assert last["content"] == [part]
    assert create(server, top_logprobs=0)["output"][0]["content"][0]["logprobs"] == []


def test_sampling_fields_work_as_in_a_chat(server):
    wild = {"temperature": 2, "top_p": 1, "top_k": 0}
    for fields in (wild | {"seed": 5}, {"stop": "ChatGLM"}, {"logit_bias": {"1": -100}}):
        chat = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0} | fields
        answer = server.post("/v1/chat/completions", json=chat | {"max_tokens": 12}).json()
        text = text_of(create(server, max_output_tokens=12, **fields))
        assert text == answer["choices"][0]["message"]["content"]


# Streams.


def test_a_stream_has_all_events_in_order(server):
    events = stream(server, metadata={"a": "b"})
    created, in_progress, item, part, *deltas = events[:-4]
    text_done, part_done, item_done, completed = events[-4:]
    kinds = ["created", "in_progress", "output_item.added", "content_part.added"]
    kinds += ["output_text.delta"] * len(deltas)
    kinds += ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event["type"] for event in events] == [f"response.{kind}" for kind in kinds]
    assert created["response"] == in_progress["response"]
    begun = created["response"]
    assert begun["status"] == "in_progress" and begun["output"] == [] and begun["usage"] is None
    response = completed["response"]
    assert drop_unique(response) == drop_unique(create(server, metadata={"a": "b"}))
    (message,) = response["output"]
    assert item["item"] == message | {"status": "in_progress", "content": []}
    assert item["output_index"] == item_done["output_index"] == 0
    assert part["part"] == message["content"][0] | {"text": ""}
    for event in (part, *deltas, text_done, part_done):
        assert event["item_id"] == message["id"]
        assert event["output_index"] == event["content_index"] == 0
    assert "".join(event["delta"] for event in deltas) == text_done["text"] == GREETING
    assert [part_done["part"]] == message["content"] and item_done["item"] == message


def test_a_stream_that_reaches_the_limit_ends_incomplete(server):
    *_, item_done, last = stream(server, max_output_tokens=3)
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert item_done["item"]["status"] == "incomplete"


def test_an_answer_without_text_has_all_events_but_deltas(server):
    kinds = [event["type"] for event in stream(server, stop="你好")]
    assert "response.output_text.delta" not in kinds and kinds[-1] == "response.completed"
    assert len(kinds) == 8


def test_events_arrive_while_the_answer_is_computed(server):
    with server.stream("POST", PATH, json=LONG_STREAM) as response:
        parts, received = response.iter_raw(), b""
        while received.count(b"output_text.delta") < 6:
            received += next(parts)
        assert server.batcher.running and b"[DONE]" not in received
        assert b"response.incomplete" in b"".join(parts)


def test_failures_in_mid_stream(server, tiny_model, tiny_tokenizer):
    branches = [{"type": "string", "minLength": i, "maxLength": 2 * i} for i in range(900)]
    properties = {"a": {"enum": ["x", "y"]}, "b": {"anyOf": branches}}
    large = {"type": "object", "properties": properties, "required": ["a", "b"]}
    large = FORMAT | {"schema": large | {"additionalProperties": False}}
    *_, last = stream(server, text={"format": large})
    failed = last["response"]
    assert last["type"] == "response.failed" and failed["status"] == "failed"
    assert (failed["error"]["code"], failed["error"]["param"]) == ("invalid_prompt", "text")
    assert failed["error"]["message"].startswith("text.format: ")
    assert failed["output"][0]["status"] == "incomplete" and failed["completed_at"] is None
    message = check_error(server.post(PATH, json=HELLO | {"text": {"format": large}}), 400, "text")
    assert message.startswith("text.format: ")  # on a slow machine for another reason
    check_error(server.get(f"{PATH}/{failed['id']}"), 404, "response_id")
    with (
        serve(openai_api.create_app, tiny_model, tiny_tokenizer, "--max-batch", "1") as other,
        other.stream("POST", PATH, json=LONG_STREAM | {"max_output_tokens": 1900}) as first,
    ):
        next(first.iter_lines())
        with other.stream("POST", PATH, json=LONG_STREAM) as waiting:
            wait_until(lambda: other.batcher.waiting)
            other.batcher.close()
            *_, last = read_events(waiting.read().decode())
    assert last["type"] == "response.failed" and last["response"]["output"] == []
    assert last["response"]["error"]["code"] == "server_error"
    assert "shutting down" in last["response"]["error"]["message"]


def test_a_client_that_leaves_ends_its_answer(server):
    with server.stream("POST", PATH, json=LONG_STREAM | {"max_output_tokens": 1500}) as response:
        lines = response.iter_lines()
        created = json.loads(next(line for line in lines if line[:5] == "data:")[5:])["response"]
        next(line for line in lines if "delta" in line)
    wait_until(lambda: not server.batcher.running)
    check_error(server.get(f"{PATH}/{created['id']}"), 404, "response_id")
    body = LONG_STREAM | {"max_output_tokens": 1500, "stream": False}
    with sending(server, format_request(PATH, body)):
        wait_until(lambda: server.batcher.running)
    wait_until(lambda: not server.batcher.running)


# Stored responses.


def test_a_conversation_continues_from_a_stored_response(server, monkeypatch, tiny_tokenizer):
    requests = record_requests(server, monkeypatch)
    first = create(server, instructions="甲")
    second = stream(server, input="再见", previous_response_id=first["id"])[-1]["response"]
    items = [{"role": "system", "content": "乙"}, {"role": "user", "content": "好"}]
    third = create(server, input=items, previous_response_id=second["id"], instructions="丙")
    rounds = [("你好", text_of(first)), ("再见", text_of(second))]
    begin = tiny_tokenizer.build_prompt("再见", rounds[:1])
    assert requests[1].input_ids == tiny_tokenizer.encode(begin)  # without the first instructions
    history = [("丙\n\n乙\n\n你好", text_of(first)), rounds[1]]
    prompt = tiny_tokenizer.build_prompt("好", history)
    assert requests[2].input_ids == tiny_tokenizer.encode(prompt)
    assert third["previous_response_id"] == second["id"]
    branch = create(server, input="谢谢", previous_response_id=second["id"])  # a second next round
    assert branch["usage"]["input_tokens_details"]["cached_tokens"] > len(requests[1].input_ids)


def test_stored_responses_are_shown_and_deleted(server):
    response, other = create(server), create(server)
    path = f"{PATH}/{response['id']}"
    assert server.get(path).json() == response
    assert server.head(path).status_code == 200
    check_error(server.get(f"{path}?stream=true"), 400, "stream")
    deleted = {"id": response["id"], "object": "response", "deleted": True}
    assert server.delete(path).json() == deleted
    reference = {"type": "item_reference", "id": response["output"][0]["id"]}
    unstored = create(server, store=False)
    assert unstored["store"] is False and response["store"] is True
    for id in (response["id"], unstored["id"], "resp_", "a" * 2000):
        for send in (server.get, server.delete):
            answer = send(f"{PATH}/{id}")
            assert len(check_error(answer, 404, "response_id")) < 200
            assert answer.json()["error"]["code"] == "response_not_found"
        answer = server.post(PATH, json=HELLO | {"previous_response_id": id})
        check_error(answer, 404, "previous_response_id")
        assert answer.json()["error"]["code"] == "previous_response_not_found"
    assert reference["id"] in check_error(
        server.post(PATH, json={"input": [reference]}), 404, "input"
    )
    assert server.get(f"{PATH}/{other['id']}").json() == other


def list_items(server, id: str, **query) -> dict:
    response = server.get(f"{PATH}/{id}/input_items", params=query)
    assert response.status_code == 200, response.text
    if response.json()["data"]:
        ResponseItemList.model_validate(response.json())
    return response.json()


def test_the_input_items_of_a_response(server, client):
    """The messages that the model has seen, without the instructions; pages of them."""
    first = create(server, instructions="甲")
    parts = [{"type": "input_text", "text": "乙"}, {"type": "input_text", "text": "丙"}]
    items = [{"role": "developer", "content": parts}, {"role": "user", "content": "再见"}]
    id = create(server, input=items, previous_response_id=first["id"], instructions="丁")["id"]
    whole = list_items(server, id, order="asc")
    assert (whole["object"], whole["has_more"]) == ("list", False)
    seen = [
        ("user", "你好"),
        ("assistant", text_of(first)),
        ("developer", "乙丙"),
        ("user", "再见"),
    ]
    assert [(i["role"], i["content"][0]["text"]) for i in whole["data"]] == seen
    kinds = [item["content"][0]["type"] for item in whole["data"]]
    assert kinds == ["input_text", "output_text", "input_text", "input_text"]
    ids = [item["id"] for item in whole["data"]]
    assert len(set(ids)) == 4 and (whole["first_id"], whole["last_id"]) == (ids[0], ids[3])
    latest = list_items(server, id, limit=2)
    assert latest["data"] == whole["data"][:1:-1] and latest["has_more"]
    rest = list_items(server, id, limit=2, after=latest["last_id"])
    assert rest["data"] == whole["data"][1::-1] and not rest["has_more"]
    empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert list_items(server, id, after=rest["last_id"], include="x") == empty
    page = client.responses.input_items.list(id, limit=1, order="asc")
    assert len(page.data) == 1 and [item.id for item in page] == ids  # fetches the other pages
    path = f"{PATH}/{id}/input_items"
    for name, *values in (("limit", 0, 101, "x", ""), ("order", "up", "")):
        for value in values:
            message = check_error(server.get(path, params={name: value}), 400, name)
            assert message.startswith(f"{name}: expected ")
    check_error(server.get(path, params={"after": first["id"]}), 404, "after")
    check_error(server.get(f"{PATH}/resp_x/input_items"), 404, "response_id")


def test_nothing_can_be_cancelled(client):
    response = client.responses.create(model="m", **HELLO)
    with pytest.raises(openai.BadRequestError, match="in the background") as caught:
        client.responses.cancel(response.id)
    assert caught.value.param == "response_id"
    assert client.responses.retrieve(response.id) == response


def test_a_long_conversation_is_shortened(server, monkeypatch, tiny_tokenizer):
    """Only with "auto": the oldest questions and answers go, and the next rounds continue."""
    requests = record_requests(server, monkeypatch)
    rounds = [(f"问题 {i} " + "甲" * 20, f"回答 {i} " + "乙" * 20) for i in range(100)]
    roles = ("user", "assistant")
    items = [
        {"role": role, "content": text}
        for texts in rounds
        for role, text in zip(roles, texts, strict=True)
    ]
    items = [
        {"role": "system", "content": "请用中文。"},
        *items,
        {"role": "user", "content": "你好"},
    ]
    body = {"input": items, "instructions": "请简短回答。"}
    for truncation in ({}, {"truncation": "disabled"}):
        message = check_error(server.post(PATH, json=body | truncation), 400, "input")
        assert "the context 2048" in message
    first = create(server, **body, truncation="auto", max_output_tokens=20)
    request = requests[-1]
    system, *kept = list_items(server, first["id"], order="asc", limit=100)["data"]
    assert system["role"] == "system"
    num_rounds = len(kept) // 2
    assert len(kept) == 2 * num_rounds + 1 and kept[0]["role"] == "user" and 5 < num_rounds < 100
    history = rounds[-num_rounds:]
    history[0] = (f"请简短回答。\n\n请用中文。\n\n{history[0][0]}", history[0][1])
    expected = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好", history))
    assert request.input_ids == expected
    limit = (2048 - 20) * 3 // 4
    longest_round = max(len(tiny_tokenizer.encode("\n\n".join(texts))) for texts in rounds) + 20
    assert limit - longest_round < len(expected) <= limit
    later = {"previous_response_id": first["id"], "truncation": "auto", "max_output_tokens": 5}
    second = create(server, **later, instructions="请简短回答。")
    assert second["truncation"] == "auto" and first["truncation"] == "auto"
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= len(expected) - 1
    short = create(server, **later, instructions="请简短回答。", max_length=300)
    assert short["usage"]["input_tokens"] <= 300 * 3 // 4
    check_error(server.post(PATH, json=later | {"input": "好" * 3000}), 400, "input")


def test_the_store_is_bounded(monkeypatch):
    store = responses_api.ResponseStore()

    def add(id: str, size: int):
        store.add(id, responses_api.Stored(b"a" * (size - 2), b"[", b"]"))

    monkeypatch.setattr(responses_api, "MAX_STORED", 3)
    monkeypatch.setattr(responses_api, "MAX_STORED_BYTES", 100)
    for id in "abc":
        add(id, 30)
    store.find("a", "response_id")
    add("d", 20)
    assert [*store.kept] == ["c", "a", "d"] and store.num_bytes == 80
    add("e", 90)
    assert [*store.kept] == ["e"] and store.num_bytes == 90
    add("f", 101)  # larger than the store
    assert [*store.kept] == ["e"]
    store.remove("e")
    assert not store.kept and store.num_bytes == 0


def test_each_key_has_its_own_responses(tiny_model, tiny_tokenizer):
    flags = ("--api-key", "one", "--api-key", "two")
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer, *flags) as server:
        server.headers["Authorization"] = "Bearer one"
        response = create(server)
        path, later = f"{PATH}/{response['id']}", HELLO | {"previous_response_id": response["id"]}
        reference = {"type": "item_reference", "id": response["output"][0]["id"]}
        server.headers["Authorization"] = "Bearer two"
        for send in (server.get, server.delete):
            check_error(send(path), 404, "response_id")
        check_error(server.get(f"{path}/input_items"), 404, "response_id")
        check_error(server.post(PATH, json=later), 404, "previous_response_id")
        check_error(server.post(PATH, json=HELLO | {"input": [reference]}), 404, "input")
        server.headers["Authorization"] = "Bearer one"
        assert server.get(path).json() == response
        assert server.delete(path).json()["deleted"]


# Wrong requests.


REFUSED = {
    "input": [
        *([], None, 7, [7], [{"role": "user"}], [{"role": "tool", "content": "a"}]),
        [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}],
        [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}],
        [{"type": "function_call_output", "call_id": "a", "output": "a"}],
        [{"type": "reasoning", "id": "a", "summary": []}],
        [{"type": "item_reference"}],
        "a" * 40000,
    ],
    "instructions": [7, [{"role": "user", "content": "a"}]],
    "max_output_tokens": [0, "8"],
    "metadata": [7, {"a": 1}, {"a" * 65: "b"}, {"a": "b" * 513}, {str(i): "" for i in range(17)}],
    "text": [
        *(7, {"format": {"type": "yaml"}}, {"format": {"type": "json_schema"}}),
        *({"verbosity": "high"}, {"format": {"type": "text", "schema": {}}}),
        {"format": {"type": "json_schema", "schema": {"type": "x"}}},
        {"format": {"type": "json_schema", "schema": {"description": "a" * 2**16}}},
    ],
    "top_logprobs": [21],
    "include": ["a", [7]],
    "tools": [[TOOL], [{"type": "web_search"}]],
    "tool_choice": ["required", {"type": "function", "name": "f"}],
    "reasoning": [{"effort": "low"}, {"summary": "detailed"}],
    "stream_options": [{"include_obfuscation": True}, {}],
    "background": [True],
    "conversation": ["conv_a"],
    "prompt": [{"id": "a"}],
    "truncation": ["all", True],
    "service_tier": ["flex"],
    "n": [2],
    "max_tokens": [8],
    "response_format": [{"type": "json_object"}],
    "temperature": [2.1],
    "stream": [1],
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_refused_with_the_name_of_the_field(server, name):
    for value in REFUSED[name]:
        message = check_error(server.post(PATH, json=HELLO | {name: value}), 400, name)
        assert len(message) < 300 and (name == "input" or message.startswith(name))


def test_fields_without_effect(server):
    unknown = {"user": "me", "prompt_cache_key": "a", "max_tool_calls": 3, "x": [1]}
    harmless = {"tools": [], "tool_choice": "auto", "truncation": "disabled", "background": False}
    harmless |= {"reasoning": {"effort": "none", "summary": "auto"}, "service_tier": "auto"}
    empty = {"include": ["reasoning.encrypted_content"], "text": {}, "metadata": {}, "n": 1}
    assert text_of(create(server, **unknown, **harmless, **empty)) == GREETING
    assert text_of(create(server, tools=[TOOL], tool_choice="none")) == GREETING
    assert stream(server, stream_options={"include_obfuscation": False})
    fields = responses_api.ResponsesRequest.model_fields.keys() - HELLO.keys() - {"model"}
    assert text_of(create(server, **dict.fromkeys(fields))) == GREETING


def test_fields_that_exclude_each_other(server):
    body = HELLO | {"ignore_eos": True, "text": {"format": FORMAT}}
    check_error(server.post(PATH, json=body), 400, "ignore_eos")
    assert check_error(server.post(PATH, json={}), 400, "input") == "input is missing."


# Clients.


class Person(pydantic.BaseModel):
    ok: bool
    age: int = pydantic.Field(le=99)


def test_openais_client(client):
    response = client.responses.create(model="m", **HELLO)
    assert response.output_text == GREETING and response.status == "completed"
    assert client.responses.retrieve(response.id) == response
    wanted = {"model": "m", "temperature": 0}
    again = client.responses.create(
        input=[{"role": "user", "content": "你好"}, *response.output, HELLO_AGAIN], **wanted
    )
    later = client.responses.create(input=[HELLO_AGAIN], previous_response_id=response.id, **wanted)
    assert again.output_text == later.output_text
    with client.responses.stream(model="m", **HELLO) as events:
        assert events.get_final_response().output_text == GREETING
    parsed = client.responses.parse(model="m", text_format=Person, **HELLO)
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(model="m", text_format=Person, **HELLO) as events:
        assert events.get_final_response().output_parsed == parsed.output_parsed
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", tools=[TOOL], **HELLO)
    assert caught.value.param == "tools"


HELLO_AGAIN = {"role": "user", "content": [{"type": "input_text", "text": "再见"}]}


def test_langchains_client(client):
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    settings = {"model": "chatglm2-6b", "base_url": str(client.base_url), "api_key": "none"}
    llm = langchain_openai.ChatOpenAI(**settings, temperature=0, use_responses_api=True)
    answer = llm.invoke("你好")
    assert answer.text == GREETING
    assert "".join(chunk.text for chunk in llm.stream("你好")) == GREETING
    whole = llm.invoke([("user", "你好"), answer, ("user", "再见")])
    response_id = answer.response_metadata["id"]
    assert llm.invoke("再见", previous_response_id=response_id).text == whole.text
    assert isinstance(llm.with_structured_output(Person).invoke("你好"), Person)


def test_the_agents_sdk(client):
    agents = pytest.importorskip("agents", reason="needs openai-agents")
    own = openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none")
    model = agents.OpenAIResponsesModel("m", own)
    settings = agents.ModelSettings(temperature=0)
    agent = agents.Agent("a", model=model, model_settings=settings)
    config = agents.RunConfig(tracing_disabled=True)
    first = agents.Runner.run_sync(agent, "你好", run_config=config)
    assert first.final_output == GREETING
    items = [*first.to_input_list(), HELLO_AGAIN]
    whole = agents.Runner.run_sync(agent, items, run_config=config)
    later = agents.Runner.run_sync(
        agent, [HELLO_AGAIN], previous_response_id=first.last_response_id, run_config=config
    )
    assert later.final_output == whole.final_output
    typed = agents.Agent("b", model=model, model_settings=settings, output_type=Person)
    assert isinstance(agents.Runner.run_sync(typed, "你好", run_config=config).final_output, Person)


@pytest.mark.parametrize("page", ["api.md", "deployment_zh.md"])
def test_the_examples_of_the_documentation(server, page, capsys):
    text = (ROOT / "docs" / page).read_text("utf-8")
    text = text.replace("http://127.0.0.1:8000", str(server.base_url).rstrip("/"))
    (source,) = [block for block in blocks(text, "python") if "client.responses" in block]
    exec(source, {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    if not shutil.which("curl"):
        pytest.skip("needs curl")

    def run(command: str, **environment) -> dict:
        command = command.replace("curl", "curl -sS")
        output = subprocess.check_output(command, shell=True, env=os.environ | environment)
        return json.loads(output)

    create, others = (block for block in blocks(text, "shell") if PATH in block)
    response = run(create)
    assert text_of(response)
    shown, deleted = (run(line, ID=response["id"]) for line in others.splitlines())
    assert shown == response and deleted["deleted"]
