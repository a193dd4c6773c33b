"""Serve ChatGLM2 with the OpenAI API: chat, responses, completions, embeddings.

    python openai_api.py --model resources/chatglm2-tiny

Clients use the base URL http://127.0.0.1:8000/v1 and any key.
"""

import time
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.start_script(__doc__, utils.add_server_arguments)

import torch.nn.functional as F
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from llguidance import LLMatcher
from openai.types import Model
from openai.types.chat import ChatCompletion
from starlette.concurrency import run_in_threadpool
from transformers import LogitsProcessorList, SequenceBiasLogitsProcessor

from chatglm2.serving import pages, responses, schema, server
from chatglm2.serving.batching import Batcher, OccurrencePenalty, Request
from chatglm2.serving.json_grammar import JsonGrammar, JsonProcessor
from chatglm2.serving.responses import TextCompletion, as_json
from chatglm2.serving.responses_api import ResponsesApi
from chatglm2.serving.responses_schema import DeletedResponse, InputItems, ResponseObject
from chatglm2.serving.server import RequestError
from chatglm2.serving.tokens_api import DetokenizeResponse, TokenizeResponse, TokensApi

COMPLETION_MAX_TOKENS = 16  # OpenAI's default


class Service:
    """The handlers of all routes, for one model."""

    def __init__(self, model, tokenizer, name: str, batcher: Batcher):
        self.model, self.tokenizer, self.batcher = model, tokenizer, batcher
        self.grammar = JsonGrammar(tokenizer, model.config.padded_vocab_size)
        self.card = Model(id=name, created=int(time.time()), object="model", owned_by="THUDM")

    async def compile_schema(self, body: schema.SamplingRequest) -> LLMatcher | None:
        """Return the grammar of the answers; `None` for text."""
        json_schema = body.response_format and body.response_format.read_schema()
        if json_schema is None:  # {} is a schema too: any JSON
            return None
        return await self.grammar.compile_in_time(json_schema)

    def encode_chat(self, messages: list[schema.Message], add_generation_prompt=True) -> list[int]:
        messages = [message.model_dump(include={"role", "content"}) for message in messages]
        for message in messages:
            message["role"] = message["role"].replace("developer", "system")
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )

    def encode_texts(self, texts: schema.Texts, param: str) -> list[list[int]]:
        """Return the ids of one or several texts; ids are returned unchanged."""
        several = texts if isinstance(texts, list) and not isinstance(texts[0], int) else [texts]
        prompts = [self.tokenizer.encode(t) if isinstance(t, str) else t for t in several]
        for ids in prompts:
            if max(ids) >= (size := len(self.tokenizer)):
                raise RequestError(400, f"{param}: the id {max(ids)} is not below {size}.", param)
        return prompts

    def build_processors(
        self, body: schema.SamplingRequest, matcher: LLMatcher | None, prompt_length: int
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
        if presence or frequency:
            processors.append(OccurrencePenalty(presence, frequency, prompt_length))
        if body.logit_bias:
            biases = {(int(token_id),): bias for token_id, bias in body.logit_bias.items()}
            if max(biases) >= (len(self.tokenizer),):
                message = f"logit_bias: ids must be below {len(self.tokenizer)}."
                raise RequestError(400, message, "logit_bias")
            processors.append(SequenceBiasLogitsProcessor(biases))
        if matcher is not None:
            processors.append(JsonProcessor(matcher, prompt_length))
        return processors

    def build_request(
        self, body: schema.SamplingRequest, matcher, ids: list[int], choice: int, **settings
    ):
        limits = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
        return server.build_request(
            body,
            ids,
            max_new_tokens=min(limits, default=None),
            seed=None if body.seed is None else body.seed + choice,
            processors=self.build_processors(body, matcher, len(ids)),
            **settings,
        )

    def build_chat(self, body: schema.ChatRequest, matcher: LLMatcher | None) -> list[Request]:
        num_logprobs = body.top_logprobs if body.logprobs is None else body.top_logprobs or 0
        settings = {
            "num_logprobs": None if body.logprobs is False else num_logprobs,
            "process_text": self.model.process_response,
        }
        ids = self.encode_chat(body.messages)
        return [self.build_request(body, matcher, ids, i, **settings) for i in range(body.n or 1)]

    def build_completions(
        self, body: schema.CompletionRequest, matcher: LLMatcher | None
    ) -> list[Request]:
        if body.max_tokens is None and not (body.max_completion_tokens or body.max_length):
            body.max_tokens = COMPLETION_MAX_TOKENS
        requests, n, prompts = [], body.n or 1, self.encode_texts(body.prompt, "prompt")
        if body.echo:
            self.check_lengths(prompts * n, "prompt")
        for ids in prompts:
            echo_text = self.tokenizer.decode(ids) if body.echo else None
            settings = {"num_logprobs": body.logprobs, "echo_text": echo_text}
            settings["prompt_logprobs"] = []  # shared by the answers to the prompt
            requests += [self.build_request(body, matcher, ids, i, **settings) for i in range(n)]
        return requests

    async def answer(
        self, form: responses.Completions, body, http_request, requests: list[Request]
    ):
        answers = server.Answers(http_request, requests, form.param, body.n or 1)
        if body.stream:
            return server.EventStream(self.events(form, body, answers), answers)
        wholes = await answers.collect()
        num_tokens = sum(len(whole.token_ids) for whole in wholes)
        usage = responses.count_usage(answers.generations, num_tokens, body.n or 1)
        # In a thread, because the log-probabilities of long prompts take time.
        return await run_in_threadpool(lambda: as_json(form.respond(wholes, usage)))

    async def events(self, form: responses.Completions, body, answers: server.Answers):
        def event(choices: list, **fields) -> str:
            chunk = form.respond_chunk(choices, **fields)
            return server.event(chunk.model_dump_json(exclude_unset=True))

        for index in range(len(answers.generations)):
            for choice in form.begin(index):
                yield event([choice])
        num_tokens = 0
        try:
            async for index, chunk in answers:
                num_tokens += len(chunk.token_ids)
                if chunk.text or chunk.logprobs:
                    yield event([form.chunk(index, chunk)])
                if chunk.finish_reason:
                    yield event([form.end(index, chunk.finish_reason)])
        except Exception as error:  # the status 200 is sent already: an event reports the error
            yield server.error_event(error)
            return
        if body.stream_options and body.stream_options.include_usage:
            usage = responses.count_usage(answers.generations, num_tokens, body.n or 1)
            yield event([], usage=usage)
        yield server.event("[DONE]")

    async def chat(self, body: schema.ChatRequest, request: HTTPRequest):
        """Answer a conversation, in chunks with "stream": true."""
        matcher = await self.compile_schema(body)
        requests = await run_in_threadpool(self.build_chat, body, matcher)
        form = responses.ChatCompletions(self.tokenizer, body.model)
        return await self.answer(form, body, request, requests)

    async def complete(self, body: schema.CompletionRequest, request: HTTPRequest):
        """Continue texts, without the prompt format of a conversation."""
        matcher = await self.compile_schema(body)
        requests = await run_in_threadpool(self.build_completions, body, matcher)
        form = responses.Completions(self.tokenizer, body.model, requests)
        return await self.answer(form, body, request, requests)

    def check_lengths(self, prompts: list[list[int]], param: str):
        """Refuse texts that are too long, before the first one is computed."""
        batcher = self.batcher
        limit, num_tokens = batcher.context * batcher.max_batch, sum(map(len, prompts))
        if num_tokens > limit:
            message = f"{param}: {num_tokens} tokens in one request; at most {limit} are allowed."
            raise RequestError(400, message, param)
        if (longest := max(map(len, prompts))) > batcher.context:
            message = f"{param}: a text has {longest} tokens, the context {batcher.context}."
            raise RequestError(400, message, param, "context_length_exceeded")

    async def embed(self, body: schema.EmbeddingRequest, request: HTTPRequest):
        """Return a vector for each text: the mean of its last hidden states, of length 1."""
        if body.dimensions not in (None, size := self.model.config.hidden_size):
            message = f"dimensions: {body.dimensions} is not the {size} of the model: leave it out."
            raise RequestError(400, message, "dimensions")
        prompts = await run_in_threadpool(self.encode_texts, body.input, "input")
        self.check_lengths(prompts, "input")
        size, vectors = self.batcher.max_batch, []
        for first in range(0, len(prompts), size):  # so that a long list needs no long queue
            requests = [Request(ids, is_embedding=True) for ids in prompts[first : first + size]]
            answers = server.Answers(request, requests, "input", is_begun=first > 0)
            wholes = await answers.collect()
            vectors += [F.normalize(whole.embedding, dim=0) for whole in wholes]
        num_tokens = sum(map(len, prompts))
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return as_json(
            responses.list_embeddings(vectors, body.encoding_format, model=body.model, usage=usage)
        )

    async def list_models(self):
        """List the only model; requests may have any model name."""
        return as_json(responses.ModelList(data=[self.card], object="list"))

    async def show_model(self, name: str):
        """Describe the model."""
        if name != self.card.id:
            message = f"There is no model {name!r}; the only one is {self.card.id!r}."
            raise RequestError(404, message, "model", "model_not_found")
        return as_json(self.card)


def create_app(model, tokenizer, args) -> FastAPI:
    app = server.create_app(model, tokenizer, args, title="ChatGLM2: the OpenAI API")
    name = Path(args.model).resolve().name  # resolve, because "." has no name
    service = Service(model, tokenizer, name, app.state.batcher)
    api, tokens = ResponsesApi(service), TokensApi(service)
    events, items = {"content": {"text/event-stream": {}}}, {"model": InputItems}
    for add, path, handler, response in (
        (app.post, "/v1/chat/completions", service.chat, {"model": ChatCompletion, **events}),
        (app.post, "/v1/responses", api.create, {"model": ResponseObject, **events}),
        (app.get, "/v1/responses/{response_id}", api.show, {"model": ResponseObject}),
        (app.delete, "/v1/responses/{response_id}", api.delete, {"model": DeletedResponse}),
        (app.get, "/v1/responses/{response_id}/input_items", api.list_inputs, items),
        (app.post, "/v1/responses/{response_id}/cancel", api.cancel, {"model": ResponseObject}),
        (app.post, "/v1/completions", service.complete, {"model": TextCompletion, **events}),
        (app.post, "/v1/embeddings", service.embed, {"model": responses.EmbeddingList}),
        (app.post, "/tokenize", tokens.tokenize, {"model": TokenizeResponse}),
        (app.post, "/detokenize", tokens.detokenize, {"model": DetokenizeResponse}),
        (app.get, "/v1/models", service.list_models, {"model": responses.ModelList}),
        (app.get, "/v1/models/{name}", service.show_model, {"model": Model}),
    ):
        add(path, response_model=None, responses={200: response, **server.ERROR_RESPONSES})(handler)
    question = {"messages": [{"role": "user", "content": "你好"}]}
    pages.add_pages(app, args, "/v1/chat/completions", question)
    return app


def main(argv=None):
    args = utils.parse_args(__doc__, utils.add_server_arguments, argv)
    listener = server.bind(args)
    tokenizer, model = utils.load_model(args)
    server.run(create_app(model, tokenizer, args), args, listener)


if __name__ == "__main__":
    utils.run_script(main)
