"""Counters and times of the servers, for Prometheus at /metrics."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .batching import Batcher, Chunk, Generation

BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """Counters and times of one app."""

    def __init__(self, batcher: Batcher):
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels):
            return Counter(f"chatglm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str):
            return Histogram(f"chatglm_{name}", text, buckets=BUCKETS_S, registry=registry)

        self.requests = counter("requests_total", "Requests", "route", "status")
        self.prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts")
        self.cached_tokens = counter("cached_prompt_tokens_total", "Prompt tokens from kept caches")
        self.generated_tokens = counter("generated_tokens_total", "Tokens of answers")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the request to the first token"
        )
        self.between_tokens = histogram(
            "time_between_tokens_seconds", "Between two tokens of an answer"
        )
        self.whole = histogram("answer_seconds", "From the request to the end of the answer")
        for state in ("running", "waiting"):
            gauge = Gauge(f"chatglm_requests_{state}", f"Requests {state}", registry=registry)
            gauge.set_function(lambda state=state: len(getattr(batcher, state)))

    def follow(self, generation: Generation):
        """Return a function that records a chunk of a generation; call it with each."""
        begin = last = time.perf_counter()
        is_first = True

        def record(chunk: Chunk):
            nonlocal last, is_first
            now = time.perf_counter()
            if is_first:
                self.prompt_tokens.inc(generation.prompt_length)
                self.cached_tokens.inc(generation.num_cached)
                self.first_token.observe(now - begin)
            elif chunk.token_ids:
                self.between_tokens.observe(now - last)
            self.generated_tokens.inc(len(chunk.token_ids))
            if chunk.finish_reason:
                self.whole.observe(now - begin)
            last, is_first = now, False

        return record


class CountRequests:
    """ASGI middleware: counts answers by route and status."""

    def __init__(self, app, counter: Counter):
        self.app, self.counter = app, counter

    async def __call__(self, scope, receive, send):
        def count(status: int):
            path = getattr(scope.get("route"), "path", "other")
            self.counter.labels(path, status).inc()

        async def send_counted(message):
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        except Exception:  # an outer middleware answers with the status 500
            count(500)
            raise
