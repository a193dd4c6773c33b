"""`serving/pages.py`: the pages of the servers for a browser, with and without a key."""

import json
import re
import shutil
import subprocess

import pytest
from servers import serve

import api
import openai_api

HTML = {"Accept": "text/html,*/*;q=0.8"}  # as browsers send it


@pytest.fixture(scope="module", params=[api, openai_api])
def server(request, tiny_model, tiny_tokenizer):
    with serve(request.param.create_app, tiny_model, tiny_tokenizer) as client:
        yield client


def test_the_start_page_has_a_command_that_works(server):
    text = server.get("/").text
    assert "Model: chatglm2-tiny" in text and "/docs" in text
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    command = text[text.index("curl") : text.index("\n\nAll")]
    assert "你好" in command
    answer = json.loads(subprocess.check_output(f"{command} -sS", shell=True))
    assert "response" in answer or "choices" in answer


def test_the_pages_load_nothing(server):
    for path in ("/", "/docs"):
        response = server.get(path, headers=HTML)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"<script|<link|<img|@import|url\(", response.text)
        assert set(re.findall(r'href="(.*?)"', response.text)) <= {"docs", "openapi.json"}
        assert server.head(path).status_code == 200


def test_docs_have_every_route_and_field(server):
    text = server.get("/docs", headers=HTML).text
    for path, operations in server.get("/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"<h2><code>{method.upper()} {path}</code></h2>" in text
    assert "<td>max_length</td><td>integer, at least 1</td>" in text


def test_the_address_is_the_one_that_the_client_used(server):
    headers = {"Host": "localhost:8443", "X-Forwarded-Proto": "https"}  # behind a proxy
    assert "curl https://localhost:8443/" in server.get("/", headers=headers).text


def test_names_are_shown_as_text(tiny_model, tiny_tokenizer):
    def create_app(model, tokenizer, args):
        args.model = "<b>&"
        return openai_api.create_app(model, tokenizer, args)

    with serve(create_app, tiny_model, tiny_tokenizer) as client:
        assert "&lt;b&gt;&amp;" in client.get("/", headers=HTML).text


def test_with_a_key(tiny_model, tiny_tokenizer):
    for create_app in (api.create_app, openai_api.create_app):
        with serve(create_app, tiny_model, tiny_tokenizer, "--api-key", "secret") as client:
            for headers in ({}, HTML):
                text = client.get("/", headers=headers).text
                assert "a browser cannot send" in text and "Bearer KEY" in text
                assert "chatglm2-tiny" not in text and "secret" not in text and "href" not in text
            for path in ("/docs", "/openapi.json"):
                assert client.get(path, headers=HTML).status_code == 401
                key = {"Authorization": "Bearer secret"}
                assert client.get(path, headers=HTML | key).status_code == 200
            assert client.post("/", json={"prompt": "你好"}).status_code == 401
