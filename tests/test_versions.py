"""What must work with every supported pair of transformers and torch.

`python tests/versions.py` runs this file in environments with the oldest, the pinned and the newest
pair, so it needs pytest and no other tool. The bundled model is used as a user would.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, DynamicCache

import chatglm2.configuration_chatglm as configuration
from chatglm2 import ChatGLMCache, ChatGLMQuantizationConfig, refresh

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "resources" / "chatglm2-tiny"
GREEDY = {"do_sample": False, "max_new_tokens": 24}
TIMEOUT_S = 90


def load(folder: Path = CHECKPOINT, **options):
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(autouse=True)
def no_warning_of_a_rename():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".*(past_key_values|cache).*deprecated")
        yield


def test_chat_and_stream_chat(model, tokenizer):
    answer, history = model.chat(tokenizer, "你好", **GREEDY)
    assert len(answer) > 5
    *_, (streamed, streamed_history, cache) = model.stream_chat(
        tokenizer, "你好", return_past_key_values=True, **GREEDY
    )
    assert (streamed, streamed_history) == (answer, history)
    second, _ = model.chat(tokenizer, "晚上睡不着怎么办", history, **GREEDY)
    *_, (streamed, _) = model.stream_chat(
        tokenizer, "晚上睡不着怎么办", history, past_key_values=cache, **GREEDY
    )
    assert streamed == second


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("kind", [ChatGLMCache, DynamicCache])
def test_generate_takes_a_cache_under_both_names(model, tokenizer, name, kind):
    ids = tokenizer(tokenizer.build_prompt("你好"), return_tensors="pt").input_ids
    expected = model.generate(ids, use_cache=False, **GREEDY)
    cache = kind()
    assert torch.equal(model.generate(ids, **{name: cache}, **GREEDY), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    with torch.no_grad():
        logits = model(ids).logits
        first = model(ids[:, :3], **{name: (cache := kind())}, use_cache=True).logits
        rest = model(ids[:, 3:], **{name: cache}, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), logits, atol=1e-4, rtol=0)


def test_generate_a_padded_batch_and_beams(model, tokenizer):
    prompts = [tokenizer.build_prompt(text) for text in ("你好", "晚上睡不着应该怎么办")]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    found = model.generate(**batch, **GREEDY)[:, batch.input_ids.shape[1] :]
    for row, prompt in zip(found, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = model.generate(ids, **GREEDY)[0, ids.shape[1] :]
        assert torch.equal(row[: len(alone)], alone)
    beams = model.generate(**batch, num_beams=2, num_return_sequences=2, **GREEDY)
    assert len(beams) == 4


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_save_and_load(tokenizer, tmp_path, bits):
    quantized = load().quantize(bits)
    question = "晚上睡不着应该怎么办"
    answer, _ = quantized.chat(tokenizer, question, **GREEDY)
    assert len(answer) > 5
    quantized.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.quantization_bit == bits
    assert loaded.chat(tokenizer, question, **GREEDY)[0] == answer
    while_loading = load(quantization_config=ChatGLMQuantizationConfig(bits=bits))
    state = loaded.state_dict()
    for key, value in while_loading.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.slow
def test_refreshed_folder_as_remote_code(model, tokenizer, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    refresh.main([str(folder)])
    code = (
        "import sys, torch; from transformers import AutoModel, AutoTokenizer\n"
        "options = dict(trust_remote_code=True); folder = sys.argv[1]\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, **options)\n"
        "model = AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()\n"
        "assert 'chatglm2' not in sys.modules\n"
        f"print(ascii(model.chat(tokenizer, '你好', **{GREEDY!r})[0]))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, "-P", "-X", "utf8", "-c", code, folder],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == ascii(model.chat(tokenizer, "你好", **GREEDY)[0])


def test_training_step(tokenizer):
    model = load().train()
    ids = tokenizer(tokenizer.build_prompt("你好") + "你好！", return_tensors="pt").input_ids
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses, gradients = [], []
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.transformer.output_layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])
    optimizer.step()
    assert model(ids, labels=ids).loss < losses[0] == pytest.approx(losses[1])


@pytest.mark.slow
def test_openai_server():
    command = [sys.executable, ROOT / "openai_api.py", "--model", CHECKPOINT, "--port", "0"]
    body = {"model": "chatglm2-6b", "messages": [{"role": "user", "content": "你好"}]}
    body |= {"max_tokens": 8, "temperature": 0}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            log = ""
            while not (address := re.search(r"^http://\S+", log, re.MULTILINE)):
                line = process.stderr.readline()
                assert line, f"the server has ended: {log}"
                log += line
            request = urllib.request.Request(
                f"{address[0]}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                message = json.load(response)["choices"][0]["message"]
            assert message["role"] == "assistant" and message["content"]
        finally:
            process.kill()


@pytest.mark.parametrize("version", ["4.57.6", "5.20.2", "5.25.0", "6.0.0"])
def test_version_outside_the_range_is_refused(monkeypatch, version):
    monkeypatch.setattr(configuration.transformers, "__version__", version)
    supported = " to ".join(configuration.TRANSFORMERS_RANGE)
    with pytest.raises(ImportError, match=f"needs transformers {supported}, found {version}"):
        configuration.check_transformers()


@pytest.mark.parametrize("version", ["5.21.0", "5.23.1", "5.24.9", "5.24.0.dev0"])
def test_version_within_the_range_is_taken(monkeypatch, version):
    monkeypatch.setattr(configuration.transformers, "__version__", version)
    configuration.check_transformers()


def test_range_is_the_one_that_pip_and_readers_see():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    oldest, newest = configuration.TRANSFORMERS_RANGE
    major, minor = newest.split(".")
    assert f"transformers>={oldest},<{major}.{int(minor) + 1}" in project["dependencies"]
    assert f"\ntransformers=={newest}." in (ROOT / "requirements.txt").read_text("utf-8")
    for page in ("README.md", "README_ZH.md", "docs/development.md"):
        words = " ".join((ROOT / page).read_text("utf-8").split())
        assert re.search(f"transformers {oldest} (to|到) {newest}", words), page
