"""Continuous batching: what a request is answered does not depend on the others."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    set_seed,
)

from chatglm2 import ChatGLMCache, ChatGLMConfig, ChatGLMForConditionalGeneration, quantization
from chatglm2.generation_chatglm import RaggedCache
from chatglm2.kernels import Backend
from chatglm2.quantization import torch_matmul
from chatglm2.serving.batching import (
    PROMPT_CHUNK,
    AnswerText,
    Batcher,
    OccurrencePenalty,
    Request,
    Unavailable,
    count_shared,
    sample,
)

ROOT = Path(__file__).parent.parent
QUESTIONS = ["你好", "讲个笑话", "今天工作好累啊", "What is your name?", "tell me a joke"]
LONG = "天空为什么是蓝色的？" * 40  # several chunks of a prompt


@pytest.fixture
def make_batcher(tiny_model, tiny_tokenizer):
    """Make batchers that end with the test."""
    with contextlib.ExitStack() as stack:

        def make(model=tiny_model, tokenizer=tiny_tokenizer, **kwargs):
            batcher = Batcher(model, tokenizer, **kwargs)
            stack.callback(batcher.join)
            stack.callback(batcher.close)
            return batcher

        yield make


@pytest.fixture
def ask(tiny_tokenizer):
    """Make a request from a question."""

    def make(question, history=(), **kwargs):
        ids = tiny_tokenizer.encode(tiny_tokenizer.build_prompt(question, history))
        return Request(ids, **{"temperature": 0, **kwargs})

    return make


async def gather(batcher, requests):
    return await asyncio.gather(*[batcher.submit(request).collect() for request in requests])


def run(batcher, *requests):
    return asyncio.run(gather(batcher, requests))


async def wait_until(condition, timeout_s=20):
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("a processor's error")


class TestAnswers:
    @pytest.mark.parametrize("bits", [0, 4, 8])
    def test_greedy_is_the_same_alone_in_a_batch_and_in_chat(
        self, bits, make_batcher, ask, tiny_checkpoint, tiny_tokenizer
    ):
        model = ChatGLMForConditionalGeneration.from_pretrained(
            tiny_checkpoint, dtype=torch.float32
        ).quantize(bits)
        batcher = make_batcher(model, kept_tokens=0)
        prompts = [*QUESTIONS, LONG, *(question * 9 for question in QUESTIONS[:2])]
        expected = [
            model.chat(tiny_tokenizer, prompt, do_sample=False, max_new_tokens=60)[0]
            for prompt in prompts
        ]
        requests = [
            ask(prompt, max_new_tokens=60, process_text=model.process_response)
            for prompt in prompts
        ]
        assert [run(batcher, request)[0].text for request in requests] == expected
        assert [whole.text for whole in run(batcher, *requests)] == expected

    def test_prompts_and_embeddings_are_rounded_and_answers_exact(
        self, make_batcher, ask, tiny_checkpoint, monkeypatch
    ):
        products = set()

        class Recorder(Backend):
            def matmul(self, x, layer):
                products.add(("exact", *x.shape[:2]))
                return torch_matmul(x, layer)

            def prompt_matmul(self, x, layer):
                products.add(("rounded", *x.shape[:2]))
                return torch_matmul(x, layer)

        monkeypatch.setattr(quantization, "pick_backend", lambda *_: Recorder())
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(4).float()
        batcher = make_batcher(model, kept_tokens=0)
        chunks = {("rounded", 1, PROMPT_CHUNK)}
        for request in (ask(LONG, max_new_tokens=3), ask(LONG, is_embedding=True)):
            rest = len(request.input_ids) % PROMPT_CHUNK
            run(batcher, request)
            answer = set() if request.is_embedding else {("exact", 1, 1)}
            assert products == {*chunks, ("rounded", 1, rest), *answer}
            products.clear()
        run(batcher, *[ask(question, max_new_tokens=9) for question in QUESTIONS])
        assert {shape[1] for kind, *shape in products if kind == "exact"} == {1}
        assert max(shape[0] for kind, *shape in products if kind == "exact") > 1

    def test_the_others_may_join_and_leave(self, make_batcher, ask):
        batcher = make_batcher(max_batch=4)
        (alone,) = run(batcher, ask(LONG, max_new_tokens=120, ignore_eos=True))

        async def crowd():
            watched = asyncio.create_task(
                batcher.submit(ask(LONG, max_new_tokens=120, ignore_eos=True)).collect()
            )
            while not watched.done():
                others = [batcher.submit(ask(q, max_new_tokens=9)) for q in QUESTIONS]
                others[0].cancel()
                await others[1].collect()
                others[2].cancel()
                await asyncio.gather(others[3].collect(), others[4].collect())
            return await watched

        together = asyncio.run(crowd())
        assert together == alone and len(alone.token_ids) == 120

    @pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.float16, 1e-2)])
    def test_ragged_rows_give_the_logits_of_each_row_alone(
        self, dtype, tolerance, tiny_model, monkeypatch
    ):
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, 4000, (1, n), generator=generator) for n in (1, 7, 300)]
        alone = []
        with torch.no_grad():
            for prompt in prompts:
                full = torch.cat((prompt, torch.tensor([[9]])), dim=1)
                alone.append(tiny_model(full, logits_to_keep=1).logits[0, 0])
            caches = [ChatGLMCache() for _ in prompts]
            monkeypatch.setattr(tiny_model.base_model, "cache_dtype", dtype)
            for prompt, cache in zip(prompts, caches, strict=True):
                tiny_model(prompt, past_key_values=cache)
            positions = torch.tensor([[cache.get_seq_length()] for cache in caches])
            batch = tiny_model(
                torch.full((3, 1), 9), positions, past_key_values=RaggedCache(caches)
            )
        logits = batch.logits[:, 0]
        torch.testing.assert_close(logits, torch.stack(alone), atol=tolerance, rtol=1e-4)
        assert {cache.layers[0].buffers[0].dtype for cache in caches} == {dtype or torch.float32}
        assert [cache.get_seq_length() for cache in caches] == [2, 8, 301]

    def test_a_prefix_tuned_model(self, make_batcher, tiny_tokenizer, ask):
        set_seed(0)
        config = ChatGLMConfig(
            num_layers=2, hidden_size=32, ffn_hidden_size=48, kv_channels=16,
            num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2,
            padded_vocab_size=4096, seq_length=512, pre_seq_len=5,
        )  # fmt: skip
        model = ChatGLMForConditionalGeneration(config, empty_init=False).eval()
        torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight)
        expected = [
            model.generate(torch.tensor([ask(q).input_ids]), max_new_tokens=12, do_sample=False)
            for q in (LONG[:90], "你好")
        ]
        requests = [ask(q, max_new_tokens=12, ignore_eos=True) for q in (LONG[:90], "你好")]
        for whole, ids in zip(run(make_batcher(model), *requests), expected, strict=True):
            ids = ids[0, -12:].tolist()
            assert whole.token_ids == ids

    def test_limits(self, make_batcher, ask):
        batcher = make_batcher(context=64)
        request = ask("你好", max_new_tokens=3, ignore_eos=True)
        (cut,) = run(batcher, request)
        assert (len(cut.token_ids), cut.finish_reason) == (3, "length")
        (full,) = run(batcher, ask("你好", max_new_tokens=20000, ignore_eos=True))
        assert len(full.token_ids) == 64 - len(request.input_ids)
        (ended,) = run(batcher, ask("你好"))
        assert ended.finish_reason == "stop"
        with pytest.raises(ValueError, match=r"The prompt has \d+ tokens, the context 64"):
            run(batcher, ask(LONG))


class TestSampling:
    def test_a_seed_holds_whoever_else_is_served(self, make_batcher, ask):
        batcher = make_batcher()
        sampled = {"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 30, "ignore_eos": True}
        (alone,) = run(batcher, ask("你好", seed=7, **sampled))
        others = [ask(question, seed=i, **sampled) for i, question in enumerate(QUESTIONS)]
        same, other, *_ = run(
            batcher, ask("你好", seed=7, **sampled), ask("你好", seed=8, **sampled), *others
        )
        assert same.token_ids == alone.token_ids != other.token_ids
        unseeded = run(batcher, *[ask("你好", **sampled) for _ in range(3)])
        assert len({tuple(whole.token_ids) for whole in unseeded}) > 1

    def test_frequencies_are_those_of_the_library(self, make_batcher, ask):
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        scores = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
        expected = scores
        for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
            expected = warper(None, expected)
        batcher = make_batcher()

        async def draw():
            request = ask("你好", temperature=0.7, top_k=12, top_p=0.8, seed=0, max_new_tokens=1)
            generation = batcher.submit(request)
            await generation.collect()
            other = batcher.submit(ask("你好", temperature=3.0, max_new_tokens=1))
            await other.collect()
            rows = {other: scores, generation: scores}
            return [sample(rows)[1] for _ in range(20000)]

        counts = torch.tensor(asyncio.run(draw())).bincount(minlength=30)
        torch.testing.assert_close(counts / 20000, expected.softmax(-1)[0], atol=0.02, rtol=0)

    @pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 0}])
    def test_what_leaves_one_token_is_greedy(self, setting, make_batcher, ask):
        batcher = make_batcher()
        settings = {"temperature": 2.0, "top_p": 1.0, "max_new_tokens": 20, **setting}
        greedy, sampled = run(
            batcher, ask("讲个笑话", max_new_tokens=20), ask("讲个笑话", **settings)
        )
        assert sampled.token_ids == greedy.token_ids

    def test_occurrence_penalty(self):
        ids = torch.tensor([[5, 5, 2, 3, 3, 3, 2]])  # the prompt is 5 5 2
        scores = OccurrencePenalty(0.5, 0.25, prompt_length=3)(ids, torch.zeros(1, 6))
        assert scores.tolist() == [[0.0, 0.0, -0.75, -1.25, 0.0, 0.0]]

    def test_penalties_change_the_answer(self, make_batcher, ask):
        request = ask("你好", max_new_tokens=40, ignore_eos=True)
        penalty = OccurrencePenalty(2.0, 2.0, len(request.input_ids))
        plain, penalized = run(
            make_batcher(),
            request,
            ask(
                "你好",
                max_new_tokens=40,
                ignore_eos=True,
                processors=LogitsProcessorList([penalty]),
            ),
        )

        def count_repeated(whole):
            return len(whole.token_ids) - len(set(whole.token_ids))

        assert count_repeated(penalized) < count_repeated(plain)

    def test_logprobs(self, make_batcher, ask, tiny_model):
        request = ask("讲个笑话", num_logprobs=3, max_new_tokens=10)
        (whole,) = run(make_batcher(), request)
        ids = request.input_ids + whole.token_ids
        with torch.no_grad():
            logits = tiny_model(torch.tensor([ids])).logits[0, len(request.input_ids) - 1 : -1]
        expected = F.log_softmax(logits, dim=-1)
        assert len(whole.logprobs) == len(whole.token_ids) == 10
        for row, logprob in zip(expected, whole.logprobs, strict=True):
            assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=1e-3)
            assert [token for token, _ in logprob.top] == row.topk(3).indices.tolist()

    def test_broken_weights_force_id_5(self, make_batcher, ask, tiny_checkpoint):
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint)
        model.transformer.encoder.final_layernorm.weight.data.fill_(float("nan"))
        (whole,) = run(make_batcher(model), ask("你好", max_new_tokens=2))
        assert whole.token_ids == [5, 5]


class TestText:
    @pytest.mark.parametrize("seed", range(8))
    def test_a_stop_is_never_shown_and_nothing_before_it_lost(self, seed, make_batcher, ask):
        batcher = make_batcher()
        (whole,) = run(batcher, ask("讲个笑话"))
        begin = int(torch.randint(1, len(whole.text) - 6, (), generator=torch.manual_seed(seed)))
        stop = whole.text[begin : begin + 1 + seed % 4]
        never = whole.text[begin : begin + 2] + "never"  # begins, but is not met

        async def read():
            generation = batcher.submit(ask("讲个笑话", stop=[never, stop]))
            return [chunk async for chunk in generation]

        chunks = asyncio.run(read())
        assert "".join(chunk.text for chunk in chunks) == whole.text[: whole.text.index(stop)]
        assert chunks[-1].finish_reason == "stop" and len(chunks) <= len(whole.token_ids)

    def test_what_was_held_for_a_stop_is_shown_at_the_end(self, make_batcher, ask):
        batcher = make_batcher()
        (whole,) = run(batcher, ask("你好"))
        (held,) = run(batcher, ask("你好", stop=[whole.text[-3:] + "!!"]))
        assert held.text == whole.text

    def test_no_half_character(self, make_batcher, ask):
        batcher = make_batcher()

        async def read():
            generation = batcher.submit(ask("你好", max_new_tokens=200, ignore_eos=True))
            return [chunk.text async for chunk in generation]

        texts = asyncio.run(read())
        assert "👋" in "".join(texts) and not any("\ufffd" in text for text in texts)

    def test_the_placeholder_is_filled_in(self, tiny_tokenizer, tiny_model):
        ids = tiny_tokenizer.encode("我 [[训练时间]]训练的 [[x ", add_special_tokens=False)
        text = AnswerText(tiny_tokenizer, 2, [], tiny_model.process_response)
        parts = [text.push(ids[: i + 1], i == len(ids) - 1)[0] for i in range(len(ids))]
        assert "".join(parts) == "我 2023年训练的 [[x"
        assert sum(part != "" for part in parts) > 3

    @pytest.mark.parametrize("step", [1, 2, 5])
    def test_pieces_make_up_the_whole(self, step, any_tokenizer):
        sentence = "Here:  def f(x):\n\treturn '🤖' # 龘ꙮ  end "
        ids = any_tokenizer.encode(sentence, add_special_tokens=False)
        for begin in range(1, len(ids) - 1):
            text, answer = AnswerText(any_tokenizer, ids[begin - 1], ["\n\n\n"], str), ids[begin:]
            ends = [*range(step, len(answer), step), len(answer)]
            parts = [text.push(answer[:end], end == len(answer))[0] for end in ends]
            whole = any_tokenizer.decode(ids[:begin]) + "".join(parts)
            assert whole == sentence or "\ufffd" in whole  # where a character is cut


class TestPlaces:
    def test_a_cancelled_request_frees_its_place_within_a_token(self, make_batcher, ask):
        batcher = make_batcher(max_batch=1)

        async def main():
            endless = batcher.submit(ask("你好", ignore_eos=True))
            async for _ in endless:
                break
            await asyncio.sleep(0.05)
            endless.cancel()
            num_chunks = endless.chunks.qsize()
            (whole,) = await gather(batcher, [ask("你好")])
            assert whole.text
            return num_chunks, endless

        num_chunks, endless = asyncio.run(main())
        assert endless.chunks.qsize() - num_chunks <= 2
        assert not batcher.running and not batcher.waiting

    def test_a_cancelled_request_waits_no_more(self, make_batcher, ask):
        batcher = make_batcher(max_batch=1, max_queue=1)

        async def main():
            endless, waiting = (batcher.submit(ask("你好", ignore_eos=True)) for _ in range(2))
            waiting.cancel()
            await wait_until(lambda: not batcher.waiting)
            batcher.submit(ask("你好")).cancel()
            endless.cancel()

        asyncio.run(main())

    def test_a_full_queue_refuses_at_once(self, make_batcher, ask):
        batcher = make_batcher(max_batch=1, max_queue=2)

        async def main():
            generations = [batcher.submit(ask("你好", ignore_eos=True)) for _ in range(3)]
            with pytest.raises(Unavailable, match="wait already"):
                batcher.submit(ask("你好"))
            for generation in generations:
                generation.cancel()
            await wait_until(lambda: not batcher.running and not batcher.waiting)
            assert (await batcher.submit(ask("你好")).collect()).text

        asyncio.run(main())

    def test_an_error_ends_its_own_request_alone(self, make_batcher, ask):
        batcher = make_batcher()
        failing = ask("你好", processors=LogitsProcessorList([Failing()]))

        async def main():
            results = [batcher.submit(request) for request in (ask("讲个笑话"), failing)]
            return await asyncio.gather(*[r.collect() for r in results], return_exceptions=True)

        answer, error = asyncio.run(main())
        assert answer.finish_reason == "stop" and "a processor's error" in str(error)
        assert run(batcher, ask("你好"))[0].text

    def test_one_may_fail_in_the_step_in_which_another_ends(self, make_batcher, ask):
        batcher = make_batcher()
        (whole,) = run(batcher, ask("你好"))
        count = len(whole.token_ids)

        def fail_at_the_end(text):
            if len(text) >= len(whole.text):
                raise RuntimeError("an error in the text")
            return text

        async def main():
            fails = ask("你好", process_text=fail_at_the_end, ignore_eos=True)
            ends = [ask("你好", max_new_tokens=n, ignore_eos=True) for n in range(count - 2, count)]
            results = [batcher.submit(request) for request in (*ends, fails, *ends)]
            return await asyncio.gather(*[r.collect() for r in results], return_exceptions=True)

        *_, error, last, _ = asyncio.run(main())
        assert "an error in the text" in str(error) and last.finish_reason == "length"
        assert run(batcher, ask("你好"))[0] == whole and batcher.thread.is_alive()

    def test_rows_that_pad_the_vocabulary_are_never_chosen(
        self, make_batcher, ask, tiny_checkpoint
    ):
        model = ChatGLMForConditionalGeneration.from_pretrained(
            tiny_checkpoint, dtype=torch.float32
        )
        model.transformer.output_layer = torch.nn.Linear(256, 4200, bias=False)
        torch.nn.init.zeros_(model.transformer.output_layer.weight)  # all are as likely
        sampled = ask("你好", temperature=2.0, top_k=0, top_p=1.0, max_new_tokens=500, seed=0)
        (whole,) = run(make_batcher(model), sampled)
        assert max(whole.token_ids) < 4096 and len(whole.token_ids) > 100

    def test_after_an_error_of_the_model_it_goes_on(self, make_batcher, ask, tiny_checkpoint):
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint)
        batcher = make_batcher(model)
        (whole,) = run(batcher, ask("你好"))

        def fail(*_):
            raise MemoryError("no room")

        hook = model.transformer.encoder.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            run(batcher, ask("讲个笑话"))
        hook.remove()
        assert run(batcher, ask("你好"))[0].text == whole.text

    def test_it_outlives_a_loop_that_nobody_reads_any_more(self, make_batcher, ask):
        batcher = make_batcher()

        async def leave():
            batcher.submit(ask("你好", max_new_tokens=300, ignore_eos=True))

        asyncio.run(leave())
        assert run(batcher, ask("你好"))[0].text

    def test_closing_ends_answers_properly(self, make_batcher, ask):
        batcher = make_batcher(max_batch=1)

        async def main():
            running, waiting = (batcher.submit(ask("你好", ignore_eos=True)) for _ in range(2))
            texts = running.__aiter__()
            first = await anext(texts)
            batcher.close()
            with pytest.raises(Unavailable, match="shutting down"):
                batcher.submit(ask("你好"))
            rest = [chunk async for chunk in texts]
            with pytest.raises(Unavailable, match="shutting down"):
                await waiting.collect()
            assert rest[-1].finish_reason == "length"
            return first

        asyncio.run(main())
        batcher.join()
        assert not batcher.thread.is_alive()

    def test_closing_shows_what_was_held_and_refuses_what_was_not_begun(self, make_batcher, ask):
        batcher = make_batcher(context=2048)
        (whole,) = run(batcher, ask("你好", max_new_tokens=12))

        async def main():
            held = batcher.submit(ask("你好", stop=[whole.text[:8] + "!"]))
            await wait_until(lambda: held.chunks.qsize() >= 5)
            embedding = batcher.submit(Request([5] * 2000, is_embedding=True))
            await wait_until(lambda: embedding in batcher.running)
            batcher.close()
            with pytest.raises(Unavailable):
                await embedding.collect()
            return await held.collect()

        answer = asyncio.run(main())
        assert answer.finish_reason == "length" and answer.text and len(answer.token_ids) >= 5

    def test_a_program_may_end_without_closing(self, tiny_checkpoint):
        program = f"""
import asyncio
from chatglm2 import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm2.serving.batching import Batcher, Request
model = ChatGLMForConditionalGeneration.from_pretrained({str(tiny_checkpoint)!r}).float()
batcher = Batcher(model, ChatGLMTokenizer.from_pretrained({str(tiny_checkpoint)!r}))
async def main():
    async for chunk in batcher.submit(Request([5, 6, 7], ignore_eos=True)):
        break
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "terminate" not in done.stderr, done.stderr

    def test_closing_with_grace_lets_answers_end(self, make_batcher, ask):
        batcher = make_batcher()

        async def main():
            chunks = batcher.submit(ask("你好")).__aiter__()
            await anext(chunks)
            batcher.close(grace_s=20)
            return [chunk async for chunk in chunks][-1].finish_reason

        assert asyncio.run(main()) == "stop"


class TestKeptCaches:
    def converse(self, batcher, ask, rounds=4):
        history, cached = [], []

        async def main():
            for i in range(rounds):
                question = QUESTIONS[i % len(QUESTIONS)]
                request = ask(question, history)
                generation = batcher.submit(request)
                history.append((question, (await generation.collect()).text))
                cached.append((generation.num_cached, len(request.input_ids)))

        asyncio.run(main())
        return history, cached

    def test_a_later_round_computes_only_what_is_new(self, make_batcher, ask, tiny_tokenizer):
        history, cached = self.converse(make_batcher(), ask)
        uncached_history, uncached = self.converse(make_batcher(kept_tokens=0), ask)
        assert history == uncached_history
        assert [kept for kept, _ in uncached] == [0] * 4
        assert cached[0][0] == 0
        for question, (kept, length) in list(zip(QUESTIONS, cached, strict=False))[1:]:
            new = len(tiny_tokenizer.build_round(question, [0]))
            assert length - kept <= new + 4

    def test_caches_of_half_the_size(self, make_batcher, ask, tiny_model, monkeypatch):
        expected, _ = self.converse(make_batcher(), ask)
        monkeypatch.setattr(tiny_model.base_model, "cache_dtype", torch.float16)
        batcher = make_batcher()
        history, cached = self.converse(batcher, ask)
        assert [question for question, _ in history] == [question for question, _ in expected]
        assert cached[-1][0] > 0 and history[0] == expected[0]
        assert {cache.layers[0].buffers[0].dtype for cache in batcher.kept} == {torch.float16}

    def test_a_common_beginning_is_copied(self, make_batcher, ask):
        batcher = make_batcher()
        story = "请记住下面这件事：" + LONG
        before = [run(make_batcher(kept_tokens=0), ask(story + q))[0] for q in QUESTIONS[:3]]

        async def main():
            generations = [batcher.submit(ask(story + question)) for question in QUESTIONS[:3]]
            return [await g.collect() for g in generations], [g.num_cached for g in generations]

        wholes, cached = asyncio.run(main())
        assert wholes == before
        assert cached[0] == 0 and min(cached[1:]) > 100  # of the first, while it runs
        assert len(batcher.kept) == 3

    def test_memory_is_bounded(self, make_batcher, ask):
        batcher = make_batcher(kept_tokens=1024)
        for i in range(12):
            run(batcher, ask(f"{i} {QUESTIONS[i % 5]}", max_new_tokens=4))
            assert len(batcher.kept) <= 4
        assert len(batcher.kept) == 4
        rooms = [cache.layers[0].buffers[0].shape[2] for cache in batcher.kept]
        assert sum(rooms) <= 1024

    def test_count_shared(self):
        assert count_shared([1, 2, 3], [1, 2, 3, 4], 3) == 3
        assert count_shared([1, 2, 3], [1, 2, 4], 2) == 2
        assert count_shared([1, 2, 3], [1, 5, 3], 3) == 1
        assert count_shared([], [1], 1) == 0


class TestEmbedding:
    @pytest.mark.parametrize("length", [1, PROMPT_CHUNK, PROMPT_CHUNK + 1, 300, 512])
    def test_mean_of_the_last_hidden_states(self, length, make_batcher, tiny_model):
        ids = torch.randint(3, 4000, (1, length), generator=torch.manual_seed(length))
        with torch.no_grad():
            expected = tiny_model.transformer(ids).last_hidden_state[0].mean(0)
        batcher = make_batcher(context=512)
        (whole,) = run(batcher, Request(ids[0].tolist(), is_embedding=True))
        torch.testing.assert_close(whole.embedding, expected, atol=1e-5, rtol=1e-4)
        assert not batcher.kept and not whole.text


def test_the_librarys_own_continuous_batching(tiny_checkpoint, ask):
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prompts = [ask(question).input_ids for question in ("你好", LONG[:99], "tell me a joke")]
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = [
        model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts
    ]
    outputs = model.generate_batch(
        prompts,
        GenerationConfig(**settings, eos_token_id=2, pad_token_id=0),
        ContinuousBatchingConfig(
            page_size=16,
            num_blocks=64,
            max_batch_tokens=128,
            use_cuda_graph=False,
            use_async_batching=False,
            default_compile_level=0,
        ),
        warmup=False,
    )
    assert [outputs[key].generated_tokens for key in sorted(outputs)] == expected
