"""Apple GPUs (mps), pretended: the CPU's answers, and nothing that Metal cannot compute."""

import asyncio
from contextlib import closing
from itertools import islice

import pytest
import torch
from fake_devices import pretend_gpus
from loading import parse
from servers import gather_answers

import utils
from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, loading
from chatglm2.serving.batching import Batcher, Request


@pytest.fixture(autouse=True)
def mac():
    with pretend_gpus():
        yield


@pytest.fixture(scope="module", params=[0, 4])
def models(request, tiny_checkpoint):
    """The bundled model on the CPU and on mps, quantized to so many bits (0: not)."""
    models = []
    with pretend_gpus():
        for device in ("cpu", "mps"):
            model = ChatGLMForConditionalGeneration.from_pretrained(
                tiny_checkpoint, dtype=torch.float32
            )
            models.append(model.quantize(request.param).to(device))
    assert {p.device.type for p in models[1].parameters()} == {"mps"}
    assert models[1].device.type == "mps"
    return models


def test_chat_and_a_batch_with_padding(models, tiny_tokenizer):
    options = {"history": [("你好", "你好！")], "do_sample": False, "max_new_tokens": 6}
    answers = [model.chat(tiny_tokenizer, "你叫什么名字？", **options) for model in models]
    assert answers[0] == answers[1]
    prompts = [tiny_tokenizer.build_prompt(query) for query in ("hi", "What is your name?")]
    inputs = tiny_tokenizer(prompts, padding=True, return_tensors="pt")
    outputs = [model.generate(**inputs.to(model.device), max_new_tokens=4) for model in models]
    assert outputs[0].tolist() == outputs[1].tolist()


def test_sampling(models, tiny_tokenizer):
    """Sampling, penalties and beams run; the generator of a real GPU would draw other tokens."""
    options = {"max_new_tokens": 4, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    assert models[1].chat(tiny_tokenizer, "hi", **options)[0]
    assert models[1].chat(tiny_tokenizer, "hi", num_beams=2, max_new_tokens=4)[0]


def test_streams_with_a_kept_cache(models, tiny_tokenizer):
    """On mps `generate` is a step ahead of what it hands over, and takes that back at the end."""
    results, options = [], {"do_sample": False, "return_past_key_values": True}
    for model in models:
        history, cache, texts = [], None, []
        for query, length in (("你好", None), ("讲个笑话", 3), ("What is your name?", 5)):
            steps = model.stream_chat(tiny_tokenizer, query, history, cache, **options)
            shown = [*islice(steps, length)]  # the first round goes on to its end
            steps.close()
            _, history, cache = shown[-1]
            texts += [text for text, _, _ in shown]
            texts.append((history, cache.history, cache.input_ids, cache.get_seq_length()))
        results.append(texts)
    assert results[0] == results[1]


def test_the_servers_batches(models, tiny_tokenizer):
    prompts = [tiny_tokenizer.build_prompt(query) for query in ("你好", "tell me a joke")]
    ids = [tiny_tokenizer.encode(prompt) for prompt in prompts]

    async def ask(model):
        with closing(Batcher(model, tiny_tokenizer)) as batcher:
            requests = [Request(i, max_new_tokens=5, temperature=0) for i in ids]
            requests.append(Request(ids[0], is_embedding=True))
            answers = await gather_answers(batcher, *requests)
        batcher.join()
        return [(answer.text, answer.embedding) for answer in answers]

    expected, answers = (asyncio.run(ask(model)) for model in models)
    assert [text for text, _ in answers] == [text for text, _ in expected]
    torch.testing.assert_close(answers[-1][1], expected[-1][1], rtol=0, atol=1e-3)


ROPES = ({"rope_type": name, "rope_theta": 1e4, "factor": 2.0} for name in ("dynamic", "yarn"))


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_seq_len": 3, "prefix_projection": True},
        *({"rope_parameters": rope} for rope in ROPES),
        {"multi_query_attention": False, "attn_implementation": "eager"},
    ],
    ids=["prefix", "dynamic", "yarn", "eager"],
)
def test_other_configurations(fields):
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}
    shape |= {"num_attention_heads": 4, "padded_vocab_size": 64, "seq_length": 64}
    shape |= {"multi_query_attention": True, "multi_query_group_num": 2}
    config = ChatGLMConfig(**{**shape, **fields})
    model = ChatGLMForConditionalGeneration(config, empty_init=False).eval()
    ids = torch.arange(80)[None] % 64
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        logits = model.to("mps")(ids.to("mps"), attention_mask=mask.to("mps")).logits
    assert logits.device.type == "mps"
    torch.testing.assert_close(logits.cpu(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_load_model(tiny_checkpoint, tiny_tokenizer, monkeypatch, capsys, bits):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "get_free_memory", lambda device: 10**8)
    argv = ["--model", str(tiny_checkpoint), "--quantize", str(bits)]
    _, model = utils.load_model(parse(*argv))
    assert f"mps, float16 with INT{bits} weights: there is an App" in capsys.readouterr().err
    assert {p.device.type for p in model.parameters()} == {"mps"}
    assert model.chat(tiny_tokenizer, "你好", max_new_tokens=2)[0]


def test_what_metal_cannot_do_is_noticed():
    with pytest.raises(TypeError, match="mps has no float64"):
        torch.zeros(2, device="mps").double()
    integers = torch.ones(2, 2, dtype=torch.int32, device="mps")
    with pytest.raises(RuntimeError, match="multiplies no matrices of integers"):
        integers @ integers
