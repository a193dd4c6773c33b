"""`api.py` over HTTP: the original's request and response, streams, refused fields."""

import json
import shutil
import subprocess
from datetime import datetime

import pytest
from servers import record_requests, serve

import api
from chatglm2 import CHAT_DEFAULTS

GREETING = "你好👋！我是 ChatGLM2-tiny，一个小小的演示模型，很高兴见到你，欢迎和我聊聊天。"


@pytest.fixture(scope="module")
def client(tiny_model, tiny_tokenizer):
    with serve(api.create_app, tiny_model, tiny_tokenizer) as client:
        yield client


def ask(client, **body) -> dict:
    response = client.post("/", json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def read_events(text: str) -> list[dict]:
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_the_response_is_the_originals(client):
    answer = ask(client, prompt="你好", history=[])
    time = datetime.strptime(answer.pop("time"), "%Y-%m-%d %H:%M:%S")
    assert abs((datetime.now() - time).total_seconds()) < 60
    assert answer == {"response": GREETING, "history": [["你好", GREETING]], "status": 200}


def test_the_curl_command_of_the_readme(client):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    command = ["curl", "-s", "-X", "POST", str(client.base_url).rstrip("/")]
    command += ["-H", "Content-Type: application/json", "-d", '{"prompt": "你好", "history": []}']
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["history"] == [["你好", answer["response"]]] and answer["response"]


def test_the_answer_is_that_of_chat(client, tiny_model, tiny_tokenizer):
    history = []
    for query in ("你好", "What is the capital of France?", "谢谢"):
        expected, _ = tiny_model.chat(tiny_tokenizer, query, history, do_sample=False)
        answer = ask(client, prompt=query, history=history)
        assert answer["response"] == expected
        history = answer["history"]
    assert len(history) == 3


def test_streamed_deltas_make_the_whole_response(client):
    body = {"prompt": "晚上睡不着应该怎么办", "history": [["你好", GREETING]], "temperature": 0}
    whole = ask(client, **body)
    response = client.post("/", json=body | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *parts, last = read_events(response.text)
    assert len(parts) > 5
    assert all(part == {"delta": part["delta"], "finished": False} for part in parts)
    assert "".join(part["delta"] for part in parts) == whole["response"]
    assert last.pop("delta") == "" and last.pop("finished") is True
    assert last | {"time": ""} == whole | {"time": ""}


def test_a_stream_that_fails_ends_with_an_error(tiny_model, tiny_tokenizer):
    body = {"prompt": "你好", "stream": True, "temperature": 100, "top_p": 1}
    with serve(api.create_app, tiny_model, tiny_tokenizer, "--max-batch", "1") as client:
        with client.stream("POST", "/", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with client.stream("POST", "/", json=body) as waiting:
                client.batcher.close()
                (event,) = read_events(waiting.read().decode())
            assert event["error"]["message"] == "The server is shutting down."
            *_, last, _ = lines
            assert json.loads(last.removeprefix("data: "))["finished"]
        assert client.post("/", json=body).status_code == 503


def test_max_length_counts_prompt_and_answer(client, tiny_tokenizer):
    length = len(tiny_tokenizer.encode(tiny_tokenizer.build_prompt("你好")))
    assert ask(client, prompt="你好", max_length=length + 2)["response"] == "你好"
    assert ask(client, prompt="你好", max_length=20000)["response"] == GREETING
    for prompt, max_length, param, limit in (
        ("你好", length, "max_length", f"max_length is {length}: give a larger"),
        ("你好" * 3000, 20000, "prompt", "the context 2048: shorten it"),
        ("你好" * 9000, None, "prompt", "the context 2048: shorten it"),  # above the default, too
    ):
        response = client.post("/", json={"prompt": prompt, "max_length": max_length})
        error = response.json()["error"]
        assert response.status_code == 400 and limit in error["message"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_unusual_requests_are_accepted(client):
    nulls = dict.fromkeys(["history", "max_length", "top_p", "stream"])
    assert ask(client, prompt="你好", **nulls, unknown=[1])["response"] == GREETING
    answer = ask(client, prompt="你好", history=[[None, "你好"]])  # as LangChain sends it
    assert answer["history"][0] == [None, "你好"] and answer["response"]
    response = client.post("/", content=rb'{"prompt": "\ud83d"}')  # half a character
    assert response.json()["history"][0][0] == "\ufffd"


def test_json_of_any_content_type_but_not_from_pages_of_other_sites(client):
    own = str(client.base_url).rstrip("/")
    form = b'{"prompt": "\xe4\xbd\xa0", "x": "="}'  # a form of one field can have this text
    for content_type in (None, "application/x-www-form-urlencoded", "text/plain", "a"):
        headers = {"Content-Type": content_type} if content_type else {}
        for origin, status in (None, 200), (own, 200), ("https://a.example", 403), ("null", 403):
            given = headers | ({"Origin": origin} if origin else {})
            assert client.post("/", content=form, headers=given).status_code == status


def test_a_wrong_field_is_refused_with_its_name(client):
    for field, values in {
        "prompt": [None, 7],
        "history": ["b", [["b"]], [{"role": "user"}]],
        "max_length": [0],
        "top_p": [1.1, "0.5"],
        "temperature": [-1, True, float("nan")],
    }.items():
        for value in values:
            response = client.post("/", content=json.dumps({"prompt": "a", field: value}))
            error = response.json()["error"]
            assert response.status_code == 422 and error["param"] == field
            assert error["message"].startswith(field)
    assert client.post("/", json={}).json()["error"]["param"] == "prompt"


def test_prompts_are_not_logged(client, caplog, capfd):
    ask(client, prompt="一个秘密 secret")
    client.post("/", json={"prompt": "一个秘密 secret", "top_p": 7})
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_the_defaults_are_those_of_chat(client, monkeypatch):
    requests = record_requests(client, monkeypatch)
    assert client.post("/", json={"prompt": "你好"}).status_code == 200
    names = ["temperature", "top_p", "top_k", "max_length"]
    request = client.batcher.fill_in(requests[0])
    assert [getattr(request, name) for name in names] == [CHAT_DEFAULTS[n] for n in names]


def test_langchains_chatglm_client(client):
    llms = pytest.importorskip("langchain_community.llms", reason="needs langchain-community")
    llm = llms.ChatGLM(endpoint_url=str(client.base_url), with_history=True, temperature=0.01)
    assert llm.invoke("你好") == GREETING
    assert llm.history == [[None, GREETING]]
    assert llm.invoke("谢谢")
