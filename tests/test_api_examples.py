"""`docs/api_examples.md`: each route has a command and a program, and they run."""

import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from servers import serve
from test_readme import blocks

import api
import openai_api

PAGE = (ROOT / "docs" / "api_examples.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
# The bundled model has another name and other ids.
REPLACED = {"chatglm2-6b": "chatglm2-tiny", "64790, 64792, 36474, 54591": "4092, 4094, 325, 2420"}
PAGES = ("GET /", "GET /docs", "GET /metrics")  # no JSON


@pytest.fixture(scope="module")
def servers(tiny_model, tiny_tokenizer):
    """A server of openai_api.py, and one of api.py."""
    with (
        serve(openai_api.create_app, tiny_model, tiny_tokenizer) as first,
        serve(api.create_app, tiny_model, tiny_tokenizer) as second,
    ):
        yield first, second


def list_routes(server) -> set[str]:
    return {
        f"{method} {route.path}"
        for route in server.app.routes
        for method in route.methods - {"HEAD"}
    }


def test_each_route_has_an_example(servers):
    first, second = map(list_routes, servers)
    assert EXAMPLES.keys() == first | second
    assert second - first == {"POST /"}
    chinese = (ROOT / "docs" / "deployment_zh.md").read_text("utf-8")
    for route in first:
        assert f" {route.split()[1]}`" in chinese, route


@pytest.mark.parametrize("route", EXAMPLES)
def test_the_examples_run(servers, route, tmp_path, capsys):
    server = servers[route == "POST /"]
    text = EXAMPLES[route].replace("http://127.0.0.1:8000", str(server.base_url).rstrip("/"))
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    (command,), (source,) = blocks(text, "shell"), blocks(text, "python")
    exec(source, {})
    assert capsys.readouterr().out.strip() or route.startswith("DELETE")
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    response = servers[0].post("/v1/responses", json={"input": "你好"})
    flags = "-sS" if route.endswith("/cancel") else "-sSf"  # it answers with an error
    command = command.replace("curl", f"curl {flags}").replace(" > docs.html", "")
    environment = os.environ | {"ID": response.json()["id"]}
    output = subprocess.check_output(command, shell=True, env=environment, cwd=tmp_path)
    assert output and (route in PAGES or json.loads(output))
