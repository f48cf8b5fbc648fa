"""Storms of adapter calls, and names that could stand for others. What a call acknowledged holds."""

from __future__ import annotations

import random
from typing import Any

from attacks.kind import Broken, kind
from attacks.target import Answer, Target, all_of

RIGHT = (200, 400, 404, 409, 503)


async def change(target: Target, call: str, name: str, *, path: str = "", **fields: Any) -> Answer:
    """Makes one adapter call with the admin key."""
    body = {"lora_name": name, **fields} | ({"lora_path": path} if path else {})
    return await target.call(call, body, key="admin", expect=RIGHT, seconds=90)


@kind("adapter_calls.storm", seconds=120)
async def storm(target: Target, draw: random.Random) -> None:
    """Thirty loads, re-points, pins and unloads of eight names at once, with requests between them."""
    voices = [str(target.demo / "adapters" / voice) for voice in ("pirate", "json", "poet", "french")]

    async def one() -> None:
        name, which = f"storm-{draw.randrange(8)}", draw.randrange(6)
        if which == 0:
            await change(target, "/load_lora_adapter", name, path=draw.choice(voices), pinned=draw.random() < 0.1)
        elif which == 1:
            await change(target, "/v1/load_lora_adapter", name, path=draw.choice(voices), load_inplace=True)
        elif which == 2:
            await change(target, "/unload_lora_adapter", name)
        elif which == 3:
            await change(target, "/v1/unload_lora_adapter", name)
        elif which == 4:
            await change(target, draw.choice(["/pin_lora_adapter", "/unpin_lora_adapter"]), name)
        else:
            params = {"max_new_tokens": 8, "ignore_eos": True}
            body = {"input_ids": [9, 10], "lora_path": name, "sampling_params": params}
            await target.call("/generate", body, expect=(200, 400, 404, 503))

    await all_of(*(one() for _ in range(30)))
    for number in range(8):
        await change(target, "/unload_lora_adapter", f"storm-{number}")


@kind("adapter_calls.left", seconds=120)
async def left(target: Target, draw: random.Random) -> None:
    """Loads, also of hub ids, whose clients leave; afterwards a load finds its place."""
    path, base = str(target.demo / "adapters" / "poet"), draw.randrange(1 << 40)

    async def one(number: int) -> None:
        where = path if number % 2 else f"nobody/adapter-{base}-{number}"
        body = {"lora_name": f"left-{base}-{number}", "lora_path": where}
        await target.leave("/load_lora_adapter", body, draw.uniform(0.01, 0.3), key="admin")

    await all_of(*(one(number) for number in range(30)))
    name = f"left-{base}"
    loaded = await change(target, "/load_lora_adapter", name, path=path)
    if loaded.status != 200 and not target.config.faults:
        raise Broken(f"after loads whose clients left: {loaded.status} {loaded.text[:200]}")
    for each in (name, *(f"left-{base}-{number}" for number in range(30))):
        await change(target, "/unload_lora_adapter", each)


@kind("adapter_calls.names", seconds=120)
async def names(target: Target, draw: random.Random) -> None:
    """Names that stand for others: `base:x`, the base's own, empty, huge or with odd characters."""
    path = str(target.demo / "adapters" / "poet")
    odd = ["", " ", "a" * 5000, "a\nb", "\x00", "a/../b", "../x", "..", "é\u0301", "\u202ex", "{}", "pirate "]
    for name in draw.sample(odd, 3):
        answer = await change(target, "/load_lora_adapter", name, path=path)
        if answer.status == 200:
            await change(target, "/unload_lora_adapter", name)
            if not name.strip() or "\x00" in name or "\n" in name:
                raise Broken(f"an adapter may be called {name[:20]!r}")
    base = next(card["id"] for card in (await models(target)) if not card.get("parent"))
    for name in (base, f"{base}:pirate", "base:pirate"):
        answer = await change(target, "/load_lora_adapter", name, path=path)
        if answer.status == 200:
            await change(target, "/unload_lora_adapter", name)
            if name != "base:pirate":
                raise Broken(f"an adapter may be called {name}, which already means something")


async def models(target: Target) -> list[dict[str, Any]]:
    """Returns what /v1/models lists."""
    answer = await target.call("/v1/models", method="GET", expect=(200, 503))
    return list(answer.json()["data"]) if answer.status == 200 else []


@kind("adapter_calls.acknowledged", seconds=180)
async def acknowledged(target: Target, draw: random.Random) -> None:
    """Loads, re-points and unloads of one name in turn: each answer is what requests then find."""
    name = f"acked-{draw.randrange(1 << 40)}"
    voices = draw.sample(["pirate", "json", "poet", "french"], 2)
    body: dict[str, Any] = {"input_ids": [9, 10, 11, 300], "sampling_params": {"max_new_tokens": 16, "temperature": 0}}
    for voice in voices:
        path = str(target.demo / "adapters" / voice)
        if voice == voices[0]:
            answer = await change(target, "/load_lora_adapter", name, path=path)
        else:
            answer = await change(target, "/v1/load_lora_adapter", name, path=path, load_inplace=True)
        if answer.status != 200:
            continue
        got, right = await target.tokens(name, body), await target.tokens(voice, body)
        if got is not None and right is not None and got != right:
            raise Broken(f"{name} was acknowledged as {voice} and answers {got} instead of {right}")
    if (await change(target, "/unload_lora_adapter", name)).status == 200:
        await target.call("/generate", body | {"lora_path": name}, expect=(400, 404, 503))
