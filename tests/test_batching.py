"""Continuous batching: the answer to a request does not depend on the other requests."""

import asyncio
import contextlib
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from servers import collect, gather_answers, submit
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.serving.batching import (
    PROMPT_SEGMENT,
    AnswerText,
    Batcher,
    Generation,
    OccurrencePenalty,
    PromptTooLong,
    Request,
    TokenLogprob,
    Unavailable,
    read_chunks,
    sample,
)

QUESTIONS = ["你好", "讲个笑话", "今天工作好累啊", "What is your name?", "tell me a joke"]
LONG = "天空为什么是蓝色的？" * 40  # several segments of a prompt
load = ChatGLMForConditionalGeneration.from_pretrained


@pytest.fixture
def make_batcher(tiny_model, tiny_tokenizer):
    """Make batchers that end with the test."""
    with contextlib.ExitStack() as stack:

        def make(model=tiny_model, **kwargs):
            batcher = Batcher(model, tiny_tokenizer, **kwargs)
            stack.callback(batcher.end)
            return batcher

        yield make


@pytest.fixture
def ask(tiny_tokenizer):
    """Make a request from a question."""

    def make(question, history=(), **kwargs):
        ids = tiny_tokenizer.encode(tiny_tokenizer.build_prompt(question, history))
        return Request(ids, **{"temperature": 0, **kwargs})

    return make


def run(batcher, *requests):
    return asyncio.run(gather_answers(batcher, *requests))


def read_chunks_of(batcher, request):
    async def read():
        queue = submit(batcher, request).queue
        return [chunk async for _, chunk in read_chunks(queue)]

    return asyncio.run(read())


async def wait_until(condition, timeout_s=20):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


# Answers.


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_greedy_is_the_same_alone_in_a_batch_and_in_chat(
    bits, make_batcher, ask, tiny_checkpoint, tiny_tokenizer
):
    model = load(tiny_checkpoint, dtype=torch.float32).quantize(bits)
    batcher = make_batcher(model, kept_tokens=0)
    prompts = [*QUESTIONS, LONG, *(question * 9 for question in QUESTIONS[:2])]
    settings = {"do_sample": False, "max_new_tokens": 24}
    expected = [model.chat(tiny_tokenizer, prompt, **settings)[0] for prompt in prompts]
    requests = [ask(p, max_new_tokens=24, process_text=model.process_response) for p in prompts]
    assert [run(batcher, request)[0].text for request in requests] == expected
    assert [whole.text for whole in run(batcher, *requests)] == expected


def test_the_others_may_join_and_leave(make_batcher, ask):
    batcher = make_batcher(max_batch=4)
    request = ask(LONG, max_new_tokens=120, ignore_eos=True)
    (alone,) = run(batcher, request)

    async def crowd():
        watched = asyncio.create_task(collect(submit(batcher, request)))
        while not watched.done():
            others = [submit(batcher, ask(q, max_new_tokens=9)) for q in QUESTIONS]
            others[0].cancel()
            await collect(others[1])
            others[2].cancel()
            await asyncio.gather(collect(others[3]), collect(others[4]))
        return await watched

    assert asyncio.run(crowd()) == alone and len(alone.token_ids) == 120


# Sampling.


def test_frequencies_are_those_of_the_library(make_batcher, ask):
    scores = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
    expected = scores
    warpers = [TemperatureLogitsWarper(1.5), TopKLogitsWarper(12), TopPLogitsWarper(0.95)]
    for warper in [*warpers, MinPLogitsWarper(0.3)]:
        before, expected = expected, warper(None, expected)
        assert (before != expected).any()
    settings = {"temperature": 1.5, "top_k": 12, "top_p": 0.95, "min_p": 0.3, "seed": 0}
    batcher = make_batcher()

    async def draw():
        requests = [
            ask("你好", temperature=3.0, max_new_tokens=1),
            ask("你好", **settings, max_new_tokens=1),
        ]
        rows = {submit(batcher, request): scores for request in requests}
        await asyncio.gather(*map(collect, rows))
        return [[*sample(rows).values()][1] for _ in range(5000)]

    counts = torch.tensor(asyncio.run(draw())).bincount(minlength=30)
    torch.testing.assert_close(counts / 5000, expected.softmax(-1)[0], atol=0.03, rtol=0)


def test_rounding_does_not_change_the_token_of_a_seed(tiny_tokenizer):
    """Scores depend in their last bits on which answers are computed together."""
    scores = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    rounded = scores + 1e-4 * torch.rand(1, 4096, generator=torch.Generator().manual_seed(2))
    for top_k in (0, 50):
        for seed in range(100):
            request = Request([5], temperature=1.0, top_k=top_k, top_p=1.0, seed=seed)
            rows = [Generation(tiny_tokenizer, request, 9, None, 0) for _ in range(2)]
            first, second = (
                sample({row: s}) for row, s in zip(rows, (scores, rounded), strict=True)
            )
            assert [*first.values()] == [*second.values()]


def test_occurrence_penalty():
    ids = torch.tensor([[5, 5, 2, 3, 3, 3, 2]])  # the prompt is 5 5 2
    scores = OccurrencePenalty(0.5, 0.25, prompt_length=3)(ids, torch.zeros(1, 6))
    assert scores.tolist() == [[0.0, 0.0, -0.75, -1.25, 0.0, 0.0]]


def test_logprobs(make_batcher, ask, tiny_model):
    request = ask("讲个笑话", num_logprobs=3, max_new_tokens=10)
    (whole,) = run(make_batcher(), request)
    ids = request.input_ids + whole.token_ids
    with torch.no_grad():
        logits = tiny_model(torch.tensor([ids])).logits[0, len(request.input_ids) - 1 : -1]
    assert len(whole.logprobs) == len(whole.token_ids) == 10
    for row, logprob in zip(F.log_softmax(logits, dim=-1), whole.logprobs, strict=True):
        assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=1e-3)
        assert [token for token, _ in logprob.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_logprobs_of_a_prompt(dtype, make_batcher, ask, tiny_model, monkeypatch):
    """They are the model's, also in several segments and after the same prompt."""
    monkeypatch.setattr(tiny_model.base_model, "cache_dtype", dtype)
    batcher = make_batcher()
    request = ask(LONG, num_logprobs=2, max_new_tokens=3, echo_text="the prompt ")
    run(batcher, replace(request, echo_text=None))
    plain, echoed = run(batcher, replace(request, echo_text=None), request)
    length = len(request.input_ids)
    assert length > 2 * PROMPT_SEGMENT and echoed.text == "the prompt " + plain.text
    assert echoed.token_ids == plain.token_ids and len(echoed.logprobs) == length + 3
    first, *prompt = echoed.logprobs[:length]
    assert first == TokenLogprob(request.input_ids[0], None, None)
    with torch.no_grad():
        logits = tiny_model(torch.tensor([request.input_ids])).logits[0, :-1]
    rows = F.log_softmax(logits, dim=-1)
    for row, measured, token_id in zip(rows, prompt, request.input_ids[1:], strict=True):
        assert measured.token_id == token_id
        tolerance = {"rel": 1e-2, "abs": 2e-2} if dtype else {"rel": 1e-4, "abs": 1e-4}
        assert measured.logprob == pytest.approx(row[token_id].item(), **tolerance)
        assert len(measured.top) == 2 and measured.top[0][1] >= measured.logprob


def test_a_prompt_alone(make_batcher, ask):
    """Without new tokens the prompt may fill the context, and prompts of one token have none."""
    batcher = make_batcher(context=300)
    requests = [
        Request([7] * length, num_logprobs=0, max_new_tokens=0, echo_text="a", max_length=length)
        for length in (1, 2, PROMPT_SEGMENT, PROMPT_SEGMENT + 1, 300)
    ]
    for request, whole in zip(requests, run(batcher, *requests), strict=True):
        assert whole.finish_reason == "length" and whole.text == "a" and not whole.token_ids
        assert [measured.token_id for measured in whole.logprobs] == request.input_ids
        assert all(measured.logprob < 0 for measured in whole.logprobs[1:])
    with pytest.raises(PromptTooLong):
        run(batcher, Request([7] * 301, max_new_tokens=0))


@pytest.fixture
def computed(tiny_model):
    """A list that gets the number of tokens of each call of the model."""
    counts = []
    hook = tiny_model.transformer.register_forward_pre_hook(
        lambda _, args: counts.append(args[0].numel())
    )
    yield counts
    hook.remove()


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_answers_to_one_prompt_measure_it_once(
    max_batch, max_new_tokens, make_batcher, ask, computed
):
    batcher = make_batcher(max_batch=max_batch)
    fields = {"num_logprobs": 2, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    request = ask(LONG, echo_text="a", **fields)
    (alone,) = run(batcher, replace(request, prompt_logprobs=[], client=1))
    computed.clear()
    wholes = run(batcher, *[request] * 3)
    length, num_steps = len(request.input_ids), max(max_new_tokens - 1, 0)
    assert sum(computed) == length + 2 + 3 * num_steps  # the last token of the prompt, and answers
    for whole in wholes:
        assert whole.text == alone.text and len(whole.logprobs) == length + max_new_tokens
        assert whole.logprobs[:length] == alone.logprobs[:length]
        for mine, other in zip(whole.logprobs[length:], alone.logprobs[length:], strict=True):
            assert mine.token_id == other.token_id
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_the_end_of_an_answer_is_measured_behind_an_echo(make_batcher, ask, tiny_tokenizer):
    batcher = make_batcher()
    for stop in ([], ["小"]):
        request = ask("你好", num_logprobs=1, echo_text="", stop=stop)
        (whole,) = run(batcher, request)
        ids = [measured.token_id for measured in whole.logprobs]
        end = [] if stop else [tiny_tokenizer.eos_token_id]
        assert ids == [*request.input_ids, *whole.token_ids, *end]


def test_broken_weights_force_id_5_and_padding_rows_are_never_chosen(
    make_batcher, ask, tiny_checkpoint
):
    model = load(tiny_checkpoint, dtype=torch.float32)
    model.transformer.output_layer = torch.nn.Linear(256, 4200, bias=False)
    torch.nn.init.zeros_(model.transformer.output_layer.weight)  # all ids are equally likely
    sampled = ask("你好", temperature=2.0, top_k=0, top_p=1.0, max_new_tokens=200, seed=0)
    (whole,) = run(batcher := make_batcher(model), sampled)
    assert max(whole.token_ids) < 4096 and len(whole.token_ids) > 100
    model.transformer.encoder.final_layernorm.weight.data.fill_(float("nan"))
    assert run(batcher, ask("你好", max_new_tokens=2))[0].token_ids == [5, 5]


# Text.


def test_a_stop_is_never_shown_and_nothing_before_it_lost(make_batcher, ask):
    batcher = make_batcher()
    (whole,) = run(batcher, ask("讲个笑话"))
    for begin, length in ((1, 1), (3, 2), (6, 3), (8, 4)):
        stop = whole.text[begin : begin + length]
        never = whole.text[begin : begin + 2] + "never"  # only its beginning occurs
        chunks = read_chunks_of(batcher, ask("讲个笑话", stop=[never, stop]))
        assert "".join(chunk.text for chunk in chunks) == whole.text[: whole.text.index(stop)]
        assert chunks[-1].finish_reason == "stop" and len(chunks) <= len(whole.token_ids)
    (held,) = run(batcher, ask("讲个笑话", stop=[whole.text[-3:] + "!!"]))
    assert held.text == whole.text


def test_the_placeholder_is_replaced(tiny_tokenizer, tiny_model):
    ids = tiny_tokenizer.encode("我 [[训练时间]]训练的 [[x ", add_special_tokens=False)
    text = AnswerText(tiny_tokenizer, [2], [], tiny_model.process_response)
    parts = [text.push(ids[: i + 1], i == len(ids) - 1)[0] for i in range(len(ids))]
    assert "".join(parts) == "我 2023年训练的 [[x" and sum(part != "" for part in parts) > 3


@pytest.mark.parametrize("step", [1, 2, 5])
def test_parts_make_up_the_whole_without_half_characters(step, any_tokenizer):
    sentence = "Here:  def f(x):\n\treturn '🤖' # 龘ꙮ  end "
    ids = any_tokenizer.encode(sentence, add_special_tokens=False)
    for begin in range(1, len(ids) - 1):
        text, answer = AnswerText(any_tokenizer, ids[:begin], ["\n\n\n"], str), ids[begin:]
        ends = [*range(step, len(answer), step), len(answer)]
        parts = [text.push(answer[:end], end == len(answer))[0] for end in ends]
        whole = any_tokenizer.decode(ids[:begin]) + "".join(parts)
        assert whole == sentence or "\ufffd" in whole  # where the answer begins in a character


def test_text_continues_any_prompt_as_decoding_both_does(any_tokenizer):
    """Also behind ids without text at the end of the prompt, and when it has no text at all."""
    tokenizer, choose = any_tokenizer, random.Random(0).choice
    pieces = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    words = [i for i, piece in enumerate(pieces) if piece.startswith("▁")]
    without_text = [0, 2, tokenizer.get_command("sop"), tokenizer.vocab_size + 5]
    for length in range(500):
        prompt, answer = (
            [choose(choose((words, without_text))) for _ in range(1 + length % size)]
            for size in (5, 3)
        )
        text = AnswerText(tokenizer, prompt, [], str)
        ends = range(1, len(answer) + 1)
        parts = [text.push(answer[:end], end == len(answer))[0] for end in ends]
        whole = tokenizer.decode(prompt + answer)
        assert tokenizer.decode(prompt) + "".join(parts) == whole, (prompt, answer)


# Places, errors, the end.


def test_an_error_ends_its_own_request_alone(make_batcher, ask):
    """Also in the step in which another request ends."""
    batcher = make_batcher()
    (whole,) = run(batcher, ask("你好"))
    count = len(whole.token_ids)

    def fail_at_the_end(text):
        if len(text) >= len(whole.text):
            raise RuntimeError("an error in the text")
        return text

    def fail(input_ids, scores):
        raise RuntimeError("a processor's error")

    fails = ask("你好", process_text=fail_at_the_end, ignore_eos=True)
    ends = [ask("你好", max_new_tokens=n, ignore_eos=True) for n in range(count - 2, count)]
    requests = (ask("你好", processors=fail), *ends, fails, *ends)
    first, *_, error, last, _ = asyncio.run(gather_answers(batcher, *requests, return_errors=True))
    assert "a processor's error" in str(first) and "an error in the text" in str(error)
    assert last.finish_reason == "length" and run(batcher, ask("你好"))[0] == whole


def test_it_continues_after_an_error_of_the_model_and_after_a_closed_loop(
    make_batcher, ask, tiny_checkpoint
):
    model = load(tiny_checkpoint)
    batcher = make_batcher(model)
    (whole,) = run(batcher, ask("你好"))

    def fail(*_):
        raise MemoryError("no room")

    hook = model.transformer.encoder.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        run(batcher, ask("讲个笑话"))
    hook.remove()

    async def leave():
        submit(batcher, ask("你好", max_new_tokens=300, ignore_eos=True))

    asyncio.run(leave())
    assert run(batcher, ask("你好"))[0].text == whole.text


def test_closing_ends_running_answers_and_refuses_prompts_and_waiting_ones(make_batcher, ask):
    batcher = make_batcher(context=2048, max_batch=2)
    (whole,) = run(batcher, ask("你好", max_new_tokens=12))

    async def main():
        held = submit(batcher, ask("你好", stop=[whole.text[:8] + "!"]))
        await wait_until(lambda: held.queue.qsize() >= 5)
        prompt = submit(batcher, Request([5] * 2000, is_embedding=True))
        waiting = submit(batcher, ask("你好"))
        await wait_until(lambda: prompt in batcher.running)
        batcher.close()
        for refused in (prompt, waiting):
            with pytest.raises(Unavailable, match="shutting down"):
                await collect(refused)
        with pytest.raises(Unavailable, match="shutting down"):
            submit(batcher, ask("你好"))
        return await collect(held)

    answer = asyncio.run(main())
    assert answer.finish_reason == "length" and answer.text and len(answer.token_ids) >= 5
    batcher.join()
    assert not batcher.thread.is_alive()


def test_closing_with_grace_lets_answers_end(make_batcher, ask):
    batcher = make_batcher()

    async def main():
        generation = submit(batcher, ask("你好"))
        await wait_until(lambda: batcher.running)
        batcher.close(grace_s=60)
        assert (await collect(generation)).finish_reason == "stop"
        await wait_until(lambda: not batcher.thread.is_alive())  # not only after 60 s

    asyncio.run(main())


@pytest.mark.slow
def test_a_program_may_end_without_closing(tiny_checkpoint):
    program = f"""
import asyncio
from chatglm2 import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm2.serving.batching import Batcher, Request
model = ChatGLMForConditionalGeneration.from_pretrained({str(tiny_checkpoint)!r}).float()
batcher = Batcher(model, ChatGLMTokenizer.from_pretrained({str(tiny_checkpoint)!r}))
async def main():
    queue = asyncio.Queue()
    batcher.submit(Request([5, 6, 7], ignore_eos=True), queue)
    await queue.get()
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "terminate" not in done.stderr, done.stderr


# Kept caches.


def converse(batcher, ask):
    """Return the history, and for each round the cached and all tokens of the prompt."""
    history, counts = [], []

    async def main():
        for question in QUESTIONS[:4]:
            generation = submit(batcher, ask(question, history))
            history.append((question, (await collect(generation)).text))
            counts.append((generation.num_cached, generation.prompt_length))

    asyncio.run(main())
    return history, counts


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_later_round_computes_only_what_is_new(
    dtype, make_batcher, ask, tiny_model, tiny_tokenizer, monkeypatch
):
    uncached_history, uncached = converse(make_batcher(kept_tokens=0), ask)
    monkeypatch.setattr(tiny_model.base_model, "cache_dtype", dtype)
    batcher = make_batcher()
    history, counts = converse(batcher, ask)
    assert history[:1] == uncached_history[:1] and (dtype or history == uncached_history)
    assert [cached for cached, _ in uncached] == [0] * 4 and counts[0][0] == 0
    for question, (cached, length) in zip(QUESTIONS[1:4], counts[1:], strict=True):
        assert length - cached <= len(tiny_tokenizer.build_round(question, [0])) + 4
    dtypes = {cache.layers[0].buffers[0].dtype for _, cache in batcher.kept}
    assert dtypes == {dtype or torch.float32}


def test_a_common_beginning_is_copied(make_batcher, ask):
    batcher = make_batcher()
    requests = [ask("请记住下面这件事：" + LONG + question) for question in QUESTIONS[:3]]
    alone = [run(make_batcher(kept_tokens=0), request)[0] for request in requests]

    async def main():
        generations = [submit(batcher, request) for request in requests]
        return [await collect(g) for g in generations], [g.num_cached for g in generations]

    wholes, cached = asyncio.run(main())
    assert wholes == alone
    assert cached[0] == 0 and min(cached[1:]) > 100  # copied from the first while it runs
    assert len(batcher.kept) == 3


def test_clients_do_not_share_caches(make_batcher, ask):
    """Neither kept caches nor those of running answers."""
    batcher = make_batcher()

    async def main():
        clients = [0, 1, 0, None, 1]
        generations = [submit(batcher, ask(LONG, max_new_tokens=40, client=c)) for c in clients]
        for generation in generations:
            await collect(generation)
        again = submit(batcher, ask(LONG, max_new_tokens=1, client=1))
        await collect(again)
        return [generation.num_cached > 0 for generation in [*generations, again]]

    assert asyncio.run(main()) == [False, False, True, False, True, True]
    assert {client for client, _ in batcher.kept} == {0, 1, None}


def test_memory_is_bounded(make_batcher, ask):
    batcher = make_batcher(kept_tokens=1024)
    for i in range(12):
        run(batcher, ask(f"{i} {QUESTIONS[i % 5]}", max_new_tokens=4))
        assert len(batcher.kept) <= 4
    assert len(batcher.kept) == 4
    assert sum(cache.layers[0].buffers[0].shape[2] for _, cache in batcher.kept) <= 1024
