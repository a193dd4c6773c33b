"""The load test: its clients and figures."""

import json

import pytest

load_test = pytest.importorskip("load_test", reason="needs aiohttp and psutil")


def test_spread_and_percentiles():
    spread = load_test.spread
    assert (spread(20, 500, 4), spread(20, 500, 1)) == ([20, 180, 340, 500], [20])
    seconds = [i / 1000 for i in range(200, -1, -1)]
    assert load_test.percentiles(seconds) == {"p50": 100, "p99": 198}


def test_an_answer_that_ends_with_an_error():
    with pytest.raises(load_test.ServerError, match="out of memory"):
        load_test.Answer().read(b'data: {"error": {"message": "out of memory"}}\n')


def test_conversations_have_the_given_length(tiny_tokenizer):
    conversations = load_test.Conversations()
    conversations.costs = {"zh": (2, 7.5, 0.85), "en": (2, 7.5, 0.33)}
    for length in (20, 100, 500) * 20:
        messages = conversations.draw(length)
        roles = [message["role"] for message in messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and len(roles) % 2
        ids = tiny_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert abs(len(ids) - length) < 15 + 0.25 * length


def test_wrong_arguments_and_servers(tmp_path, capsys, monkeypatch):
    for argv, message in (
        (["--url", "http://127.0.0.1:1/v1", "--threads", "1"], "leave --threads 1 out"),
        (["--clients", "1"], "at least 2 clients"),
    ):
        with pytest.raises(SystemExit):
            load_test.parse_args(argv)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no server answers"):
        load_test.main(["--url", "http://127.0.0.1:1/v1"])
    (tmp_path / "openai_api.py").write_text("raise SystemExit('no such checkpoint')")
    monkeypatch.setattr(load_test, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="ended with 1"):
        load_test.main([])


@pytest.mark.slow
def test_the_report(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load_test, "NUM_ROUNDS", 1)
    file = tmp_path / "report.json"
    flags = ["--model", str(tiny_checkpoint), "--threads", "1", "--json", str(file)]
    load_test.main([*flags, "--clients", "3", "--requests", "2", "--new-tokens", "8"])
    report = json.loads(file.read_text("utf-8"))
    low, _, high = report["prompt_tokens"]
    assert 10 < low < 40 and 400 < high < 600  # the costs are calibrated
    one, many = report["clients"]["1"], report["clients"]["3"]
    assert min(one["tokens_per_s"], many["tokens_per_s"], report["ratio"]) > 0
    assert min(one["between_tokens_ms"]["p50"], many["first_token_ms"]["p50"]) > 0
    assert many["server_cpu_ms_per_token"] > 0 and report["model"] == "chatglm2-tiny"
    output = capsys.readouterr().out
    assert "| clients |" in output and f"ratio {report['ratio']}" in output
