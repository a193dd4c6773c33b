"""The load test: its clients and figures."""

import asyncio
import json

import load_test
import pytest
from load_test import Answer, Conversations, ServerError, spread

aiohttp_web = pytest.importorskip("aiohttp.web", reason="needs aiohttp")


def test_percentiles():
    seconds = [i / 1000 for i in range(201)]
    assert load_test.percentiles(seconds[::-1]) == {"p50": 100, "p99": 198}


def test_spread():
    assert spread(20, 500, 4) == [20, 180, 340, 500]
    assert spread(20, 500, 1) == [20]


def test_an_answer_is_read_from_its_events():
    answer = Answer()
    for event in (
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "你"}}]},
        {"choices": [{"delta": {"content": "好"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}},
    ):
        answer.read(f"data: {json.dumps(event)}\n".encode())
        answer.read(b"\n")
    answer.read(b"data: [DONE]\n")
    assert (answer.text, answer.prompt_tokens, answer.new_tokens) == ("你好", 3, 5)
    assert len(answer.times) == 2
    with pytest.raises(ServerError, match="out of memory"):
        answer.read(b'data: {"error": {"message": "out of memory"}}\n')


@pytest.mark.parametrize("length", [20, 100, 500])
def test_conversations_have_the_given_length(tiny_tokenizer, length):
    conversations = Conversations()
    conversations.costs = {"zh": (2, 7.5, 0.85), "en": (2, 7.5, 0.33)}
    for _ in range(20):
        messages = conversations.draw(length)
        roles = [message["role"] for message in messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and len(roles) % 2
        ids = tiny_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert abs(len(ids) - length) < 15 + 0.25 * length


class WordServer:
    """Answers with numbers, one a millisecond; refuses each third request once."""

    def __init__(self):
        self.num_requests = 0

    async def list_models(self, request):
        return aiohttp_web.json_response({"data": [{"id": "words"}]})

    async def answer(self, request):
        body = await request.json()
        self.num_requests += 1
        if self.num_requests % 3 == 0:
            return aiohttp_web.Response(status=503, headers={"Retry-After": "0.01"})
        response = aiohttp_web.StreamResponse()
        await response.prepare(request)

        async def send(event):
            await response.write(f"data: {json.dumps(event)}\n\n".encode())

        for number in range(body["max_tokens"]):
            await send({"choices": [{"delta": {"content": f"{number} "}}]})
            await asyncio.sleep(0.001)
        texts = [message["content"] for message in body["messages"]]
        tokens = 5 + 8 * len(texts) + sum(map(len, texts)) // 2
        usage = {"prompt_tokens": tokens, "completion_tokens": body["max_tokens"]}
        await send({"choices": [], "usage": usage})
        return response

    async def measure(self, argv: list[str]) -> dict:
        """Return the report of a load test of this server."""
        app = aiohttp_web.Application()
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/v1/chat/completions", self.answer)
        runner = aiohttp_web.AppRunner(app)
        await runner.setup()
        await aiohttp_web.TCPSite(runner, "127.0.0.1", 0).start()
        args, _ = load_test.parse_args(argv)
        try:
            return await load_test.measure(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", args)
        finally:
            await runner.cleanup()


def test_the_report(capsys):
    argv = ["--clients", "6", "--requests", "3", "--new-tokens", "4"]
    report = asyncio.run(WordServer().measure(argv))
    low, _, high = report["prompt_tokens"]
    assert 10 < low < 40 and 450 < high < 550  # the costs are calibrated
    one, many = report["clients"][1], report["clients"][6]
    assert many["tokens_per_s"] > one["tokens_per_s"] > 0 and report["ratio"] > 1
    assert min(one["between_tokens_ms"]["p50"], many["first_token_ms"]["p50"]) > 0
    load_test.print_report(report)
    assert f"ratio {report['ratio']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--url", "http://127.0.0.1:1/v1", "--threads", "1"], "leave --threads 1 out"),
        (["--clients", "1"], "at least 2 clients"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        load_test.parse_args(argv)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_no_server():
    with pytest.raises(SystemExit, match="no server answers"):
        load_test.main(["--url", "http://127.0.0.1:1/v1"])


def test_a_server_that_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "openai_api.py").write_text("raise SystemExit('no such checkpoint')")
    monkeypatch.setattr(load_test, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="ended with 1"):
        load_test.main([])


@pytest.mark.slow
def test_openai_api(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load_test, "NUM_ROUNDS", 1)
    file = tmp_path / "report.json"
    flags = ["--model", str(tiny_checkpoint), "--threads", "1", "--json", str(file)]
    short = ["--clients", "3", "--requests", "2", "--prompt-tokens", "20", "100"]
    load_test.main([*flags, *short, "--new-tokens", "8"])
    report = json.loads(file.read_text("utf-8"))
    assert report["model"] == "chatglm2-tiny" and report["ratio"] > 0
    assert report["clients"]["3"]["server_cpu_ms_per_token"] > 0
    assert "| clients |" in capsys.readouterr().out
