"""Bodies that are nearly right: each field of each call with other types, limits, depth, or broken as text."""

from __future__ import annotations

import random
from typing import Any

from fixtures.adapters.mutations import Mutator

from attacks.kind import Broken, kind
from attacks.target import Target, all_of

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}], "name": "me"},
]
SAMPLING = {
    "max_tokens": 3, "min_tokens": 1, "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"5": -3.5},
    "stop": ["!", "ok"], "stop_token_ids": [7], "ignore_eos": False, "skip_special_tokens": True,
}  # fmt: skip
NATIVE = {"max_new_tokens": 3, **{name: value for name, value in SAMPLING.items() if name != "max_tokens"}}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "poet", "messages": TURNS, "logprobs": True, "top_logprobs": 2, **SAMPLING}),
    ("/v1/chat/completions", {"messages": TURNS, "lora_path": {"poet": 0.5}, "stream": True, "max_tokens": 3,
                              "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"model": "poet", "prompt": ["a", "b"], "logprobs": 1, "echo": True, **SAMPLING}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "stream": True, "suffix": None, "best_of": 1, "max_tokens": 3}),
    ("/generate", {"text": ["a", "b"], "lora_path": ["poet", None], "sampling_params": NATIVE, "rid": ["x", "y"]}),
    ("/generate", {"input_ids": [1, 2, 3], "sampling_params": NATIVE, "return_logprob": True, "stream": True,
                   "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}),
    ("/tokenize", {"messages": TURNS, "add_generation_prompt": True, "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 256], "skip_special_tokens": True}),
    ("/abort_request", {"rid": "x", "abort_all": False}),
]  # fmt: skip
OF_ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("/load_lora_adapter", {"lora_name": "fuzz", "lora_path": "fuzz", "pinned": True, "preload": True}),
    ("/v1/load_lora_adapter", {"lora_name": "fuzz", "lora_path": "fuzz", "load_inplace": True}),
    ("/unload_lora_adapter", {"lora_name": "fuzz"}),
    ("/v1/unload_lora_adapter", {"lora_name": "fuzz", "lora_int_id": 3}),
    ("/pin_lora_adapter", {"lora_name": "fuzz"}),
    ("/unpin_lora_adapter", {"lora_name": "fuzz"}),
    ("/load_lora_adapter_from_tensors", {"lora_name": "a", "serialized_tensors": ["x"]}),
]
TYPES = ["text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "multipart/form-data"]


async def mutated(target: Target, mutator: Mutator, calls: list[tuple[str, dict[str, Any]]], key: str) -> None:
    """Makes one mutated call; an error must say something."""
    path, body = mutator.draw.choice(calls)
    headers = {"Content-Type": mutator.draw.choice(TYPES)} if mutator.draw.random() < 0.02 else {}
    data = mutator.json(body)
    answer = await target.call(path, data, key=key, headers=headers)
    if '"server_error"' in answer.text and answer.status < 500:
        raise Broken(f"{path} {data[:200]!r}: {answer.text[:200]}")
    if 400 <= answer.status < 500 and not answer.json()["error"]["message"]:
        raise Broken(f"{path} {data[:200]!r}: an error without a message")


@kind("fields.mutated")
async def mutated_calls(target: Target, draw: random.Random) -> None:
    """Forty calls of inference with one to three fields changed."""
    mutator = Mutator(draw.randrange(1 << 30))
    await all_of(*(mutated(target, mutator, CALLS, "attacker") for _ in range(40)))


@kind("fields.mutated_adapter_calls")
async def mutated_adapter_calls(target: Target, draw: random.Random) -> None:
    """Twenty loads, unloads and pins with one to three fields changed; the names of others are left alone."""
    mutator = Mutator(draw.randrange(1 << 30))
    await all_of(*(mutated(target, mutator, OF_ADAPTERS, "admin") for _ in range(20)))


@kind("fields.headers")
async def mutated_headers(target: Target, draw: random.Random) -> None:
    """Odd paths, queries and header values."""
    mutator = Mutator(draw.randrange(1 << 30))
    paths = ["/v1/models", "/v1/models/poet", "/health", "/ready", "/metrics", "/version", "/server_info"]
    for _ in range(20):
        path = draw.choice(paths) + draw.choice(["/", "?", "//", "%", "?a=", "/../", "%00", "%2e%2e/"])
        path += "".join(c for c in mutator.text() if c.isprintable() and c not in "# ")[:2000]
        name = draw.choice(["Authorization", "X-Request-Id", "Accept", "Cookie", "Range", "Traceparent"])
        value = "".join(c for c in mutator.text() if c.isprintable())[:4000]
        try:
            await target.call(path, method="GET", headers={name: value}, may_cut=True)
        except UnicodeError:
            continue  # aiohttp's client refuses to send this call
