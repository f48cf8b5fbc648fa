"""Mutated calls of every route over a real front end: each gets a response below 500 in time, as does the next."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientError, ClientTimeout
from aiohttp.test_utils import TestClient
from fixtures.adapters.mutations import Mutator
from fixtures.serving.api_calls import serve
from fixtures.serving.loading_front import adapter_dir
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.messages import AdapterState, LoadAdapter, UnloadAdapter
from tokenizer_proc.http.app import ROUTES

CASES, AT_ONCE = 10_000, 8
SECONDS = 15.0
"""The time limit of a response in seconds; a case takes about a millisecond."""

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}], "name": "me"},
]
SAMPLING = {
    "max_tokens": 3, "min_tokens": 1, "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"5": -3.5},
    "stop": ["!", "ok"], "stop_token_ids": [7], "ignore_eos": False, "skip_special_tokens": True,
}  # fmt: skip


class LoadingScheduler(ScriptedScheduler):
    """A scheduler that carries out every load and unload a moment later, by a callback of the event loop."""

    def send(self, message: msgspec.Struct) -> None:
        match message:
            case UnloadAdapter():
                self._later(AdapterState(adapter_id=message.adapter_id, state="gone"))
            case LoadAdapter() if self.front.capacity is not None and self.started:
                state = "resident" if message.preload else "host"
                self._later(AdapterState(adapter_id=message.adapter_id, state=state, revision="r"))
            case _:
                super().send(message)

    started = False

    def _later(self, state: AdapterState) -> None:
        asyncio.get_running_loop().call_soon(self.front.handle, state)


def bodies(adapter: Path) -> list[tuple[str, Any]]:
    """Returns (path, body) of valid calls; a path that is listed twice is fuzzed twice as often."""
    chat = {"model": "sql", "messages": TURNS, "stream": False, "logprobs": True, "top_logprobs": 2, **SAMPLING}
    native = {"max_new_tokens": 3, **{k: v for k, v in SAMPLING.items() if k != "max_tokens"}}
    load = {"lora_name": "guest", "lora_path": str(adapter)}
    return [
        ("/v1/chat/completions", chat | {"chat_template_kwargs": {"a": 1}, "user": "me"}),
        ("/v1/chat/completions", {"messages": TURNS, "lora_path": {"sql": 0.5}, "stream": True,
                                  "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"model": "base:sql", "prompt": ["a", "b"], "logprobs": 1, "echo": True, **SAMPLING}),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "stream": True, "suffix": None, "best_of": 1}),
        ("/generate", {"text": ["a", "b"], "lora_path": ["sql", None], "sampling_params": native, "rid": ["x", "y"]}),
        ("/generate", {"input_ids": [1, 2, 3], "sampling_params": native, "return_logprob": True, "stream": True,
                       "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}),
        ("/tokenize", {"messages": TURNS, "add_generation_prompt": True, "add_special_tokens": True}),
        ("/tokenize", {"prompt": "hello", "model": "sql"}),
        ("/detokenize", {"tokens": [1, 2, 256], "skip_special_tokens": True}),
        ("/load_lora_adapter", load | {"pinned": True, "preload": True}),
        ("/v1/load_lora_adapter", load | {"load_inplace": True, "is_3d_lora_weight": False}),
        ("/unload_lora_adapter", {"lora_name": "guest"}),
        ("/v1/unload_lora_adapter", {"lora_name": "guest", "lora_int_id": 3}),
        ("/pin_lora_adapter", {"lora_name": "sql"}),
        ("/unpin_lora_adapter", {"lora_name": "sql"}),
        ("/load_lora_adapter_from_tensors", {"lora_name": "a", "serialized_tensors": ["x"]}),
        ("/abort_request", {"rid": "x", "abort_all": False}),
        ("/v1/chat/completions/render", chat),
        *((path, {}) for path in ("/ping", "/flush_cache", "/reset_prefix_cache")),
    ]  # fmt: skip


TYPES = ["text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "multipart/form-data"]


async def call(client: TestClient, path: str, data: bytes, headers: dict[str, str]) -> None:
    """Sends one call; asserts that the response is not a server error."""
    async with client.post(path, data=data, headers=headers, timeout=ClientTimeout(SECONDS)) as answer:
        text = (await answer.read()).decode()
    case = f"{path} {data[:2000]!r} -> {answer.status} {text[:500]}"
    assert answer.status < 500, case
    assert '"server_error"' not in text, case
    if answer.status >= 400:
        assert json.loads(text)["error"]["message"], case


async def all_cases(mutator: Mutator, work: Any, at_once: int = AT_ONCE) -> None:
    """Runs all cases, `at_once` at a time; each case draws from the seed before it awaits anything."""
    cases = iter(range(CASES))

    async def some() -> None:
        for _ in cases:
            await work(mutator)

    await asyncio.gather(*(some() for _ in range(at_once)))


def test_mutated_bodies_are_answered_below_500(tmp_path: Path) -> None:
    scheduler = LoadingScheduler("ok!", "sql")
    frontend = scheduler.frontend(
        runtime_loads=True, enable_lora=True, max_loras=4, max_pinned=3, max_open_requests=512
    )
    sound = bodies(adapter_dir(tmp_path / "guest"))
    assert {path for path, _ in sound} == {route.path for route in ROUTES if route.method == "POST"}

    async def scenario(client: TestClient) -> None:
        scheduler.started = True

        async def work(mutator: Mutator) -> None:
            path, body = mutator.draw.choice(sound)
            headers = {"Content-Type": "application/json"}
            if mutator.draw.random() < 0.02:
                headers["Content-Type"] = mutator.draw.choice(TYPES)
            await call(client, path, mutator.json(body), headers)

        for path, body in sound:
            await call(client, path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        await all_cases(Mutator(11), work)
        assert frontend.router.open == 0
        async with client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2}}) as answer:
            assert (await answer.json())["text"] == "ok"

    serve(frontend, scenario, runtime_loads=True, seconds=120)


RAW = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"X-Request-Id: abc\r\nContent-Length: 47\r\nConnection: close\r\n\r\n"
    b'{"messages":[{"role":"user","content":"Hello"}]}',
    b"GET /v1/models/sql?a=b HTTP/1.1\r\nHost: localhost:80\r\nConnection: close\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b'Transfer-Encoding: chunked\r\n\r\nc\r\n{"text":"a"}\r\n0\r\n\r\n',
    b"GET /metrics HTTP/1.1\r\nHost: [::1]\r\nAuthorization: Bearer abc\r\nCookie: a=b; c\r\nConnection: close\r\n\r\n",
)


async def exchange(client: TestClient, data: bytes, limit: float = SECONDS) -> bytes:
    """Sends these bytes on a new connection, half-closes it after `limit` seconds, and returns the response."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        writer.write(data)
        answer = asyncio.ensure_future(reader.read())
        if not (await asyncio.wait([answer], timeout=limit))[0]:  # the server still waits for more bytes
            writer.write_eof()
        return await asyncio.wait_for(answer, SECONDS)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_mutated_raw_requests_are_answered_below_500(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "aiohttp.server")
    frontend = ScriptedScheduler("ok!", "sql").frontend()

    async def scenario(client: TestClient) -> None:
        async def work(mutator: Mutator) -> None:
            data = mutator.raw(mutator.draw.choice(RAW))
            answer = await exchange(client, data, limit=0.05)
            assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")), (data, answer)

        await all_cases(Mutator(12), work, at_once=32)
        assert (await exchange(client, RAW[1])).startswith(b"HTTP/1.1 200")

    serve(frontend, scenario, seconds=120)


def test_mutated_paths_and_headers_are_answered_below_500() -> None:
    frontend = ScriptedScheduler("ok!", "sql").frontend()
    paths = [route.path.replace("{id:.+}", "sql") for route in ROUTES if route.method == "GET"]

    async def scenario(client: TestClient) -> None:
        async def work(mutator: Mutator) -> None:
            path = mutator.draw.choice(paths)
            if mutator.draw.random() < 0.7:
                path += mutator.draw.choice(["/", "?", "//", "%", "?a="]) + mutator.text().replace("#", "")
            name = mutator.draw.choice(["Host", "Authorization", "X-Request-Id", "Accept", "Cookie", "Expect", "Range"])
            headers = {name: "".join(c for c in mutator.text() if c.isprintable())[:4000]}
            try:
                answer = await client.get(path, headers=headers, timeout=ClientTimeout(SECONDS))
            except (ClientError, ValueError):
                return  # aiohttp's client refuses to send this call
            async with answer:
                assert answer.status < 500 or path.startswith("/ready"), (path, headers)

        await all_cases(Mutator(13), work)

    serve(frontend, scenario, seconds=120)
