"""Text work whose cost a client chooses: encoding, decoding, templates, logprobs. It is bounded, or a 4xx."""

from __future__ import annotations

import asyncio
import random

from attacks.kind import Broken, kind
from attacks.kinds.adapter_files import write_adapter
from attacks.target import Target, all_of

MB = 1_000_000
PIECES = [
    "a",
    " ",
    "\n",
    "a b ",
    "日本",
    "é",
    "👩‍👩‍👧",
    "\u0301",
    "0",
    "<s>",
    "</s>",
    "aA1 ",
    "-" * 7,
    "\x00",
    "Hello world. ",
]


@kind("texts.tokenize", seconds=120)
async def tokenize(target: Target, draw: random.Random) -> None:
    """/tokenize of texts of 0.1 to 30 MB, also without any place to split."""
    piece = draw.choice(PIECES)
    size = int(draw.choice([0.1, 1, 4, 30]) * MB)
    text = (piece * (size // len(piece.encode()) + 1))[:size]
    body = {"prompt": text} if draw.random() < 0.7 else {"messages": [{"role": "user", "content": text}]}
    await target.call("/tokenize", body, seconds=110, may_cut=True)


@kind("texts.abandoned")
async def abandoned(target: Target, draw: random.Random) -> None:
    """Eight clients that ask for the tokens of 4 MB and leave; the work of a client that left is dropped."""
    body = {"prompt": draw.choice(PIECES[:7]) * (2 * MB)}
    path = draw.choice(["/tokenize", "/v1/completions"])
    await all_of(*(target.leave(path, body, draw.uniform(0.05, 1.5)) for _ in range(8)))


@kind("texts.prompts")
async def prompts(target: Target, draw: random.Random) -> None:
    """Prompts that are far too long, many, or as long as the context: the work behind them is asked for too."""
    which = draw.randrange(4)
    if which == 0:
        await target.call("/v1/completions", {"prompt": "word " * MB, "max_tokens": 1}, expect=(400, 413, 503))
    elif which == 1:
        await target.call("/v1/completions", {"prompt": ["a b c"] * 2000, "max_tokens": 1}, may_cut=True)
    elif which == 2:
        ids = [[draw.randrange(8, 1500) for _ in range(1900)] for _ in range(8)]
        await target.call("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 4}})
    else:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 20_000
        await target.call("/v1/chat/completions", {"messages": turns, "max_tokens": 1}, expect=(400, 413, 503))


@kind("texts.scored", seconds=120)
async def scored(target: Target, draw: random.Random) -> None:
    """echo with 20 logprobs of 40 prompts of some 2,000 tokens, read or left."""
    ids = [[draw.randrange(8, 1500) for _ in range(draw.choice([500, 1900]))] for _ in range(40)]
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 20, "stream": draw.random() < 0.3}
    if draw.random() < 0.5:
        await target.leave("/v1/completions", body, draw.uniform(0.5, 5))
    else:
        await target.call("/v1/completions", body, seconds=110)


@kind("texts.detokenize")
async def detokenize(target: Target, draw: random.Random) -> None:
    """/detokenize of a million ids, of the same one, or of ids that do not exist."""
    ids = [draw.randrange(1500)] * MB if draw.random() < 0.5 else [draw.choice([5, 900, 1 << 40, -1])] * 100_000
    await target.call("/detokenize", {"tokens": ids}, may_cut=True)


@kind("texts.stops")
async def stops(target: Target, draw: random.Random) -> None:
    """Thousands of stop strings, very long ones, and huge biases."""
    cases = [
        {"stop": ["a" * 100_000]}, {"stop": [f"{n} never" for n in range(20_000)]}, {"stop_token_ids": [5] * 100_000},
        {"logit_bias": {str(n): -1.0 for n in range(1500)}}, {"stop": [""]}, {"top_logprobs": 10**6},
        {"max_tokens": 10**12}, {"n": 10**6}, {"seed": 1 << 70},
    ]  # fmt: skip
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8} | draw.choice(cases)
    await target.call("/v1/chat/completions", body)


ENDLESS = [
    "{% for a in range(10**9) %}{% endfor %}x", "{{ 'x' * 10**12 }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3,
    "{{ 10 ** 10 ** 8 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set x = 'a' * 10**8 %}{{ (x + x)|length }}", "{{ range(10**8) | list | length }}",
    "{{ messages | tojson * 10**7 }}", "{% include '/etc/passwd' %}",
]  # fmt: skip


@kind("texts.templates", seconds=120)
async def templates(target: Target, draw: random.Random) -> None:
    """An adapter whose chat template never ends, or takes all memory: a 400 for its requests alone."""
    name = f"template-{draw.randrange(1 << 30)}"
    path = write_adapter(target, name, template=draw.choice(ENDLESS))
    load = {"lora_name": name, "lora_path": str(path)}
    loaded = await target.call("/load_lora_adapter", load, key="admin", expect=(200, 400))
    if loaded.status == 200:
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        answers = await all_of(*(target.call("/v1/chat/completions", body, expect=(400, 503)) for _ in range(3)))
        await target.call("/unload_lora_adapter", {"lora_name": name}, key="admin", expect=(200, 400, 404))
        if any("Traceback" in answer.text for answer in answers):
            raise Broken("an answer shows a traceback")
    await asyncio.sleep(0)
