"""FakeEngine behaves like Engine in all that an embedding program can see."""

from __future__ import annotations

import asyncio

import pytest

from engine import EngineDead, InvalidRequest, LoRARequest, NotFound, SamplingParams
from engine.testing import FakeEngine


def test_replies_come_from_table_function_or_echo() -> None:
    async def main() -> None:
        async with FakeEngine({"hi": "hello there"}) as engine:
            answers = await engine.generate_all(["hi", "what", [3, 4], [{"role": "user", "content": "hi"}]])
            assert [answer.text for answer in answers] == ["hello there", "what", "3 4", "hello there"]
        async with FakeEngine(lambda text, lora: f"{lora} says {text}", adapters=["a", "b"]) as engine:
            answers = await engine.generate_all(
                ["x"] * 4, lora=["a", None, {"b": 0.5, "a": 1.0}, LoRARequest("b", 1, "b")]
            )
            assert [answer.text for answer in answers] == ["a says x", "None says x", "a+b says x", "b says x"]
            assert [card.name for card in await engine.adapters()] == ["a", "b"]
            assert [request[0] for request in engine.requests] == ["x"] * 4

    asyncio.run(main())


def test_errors_max_tokens_and_n_are_as_in_engine() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            (answer,) = await engine.generate_all(["one two three"], SamplingParams(max_tokens=2))
            assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("one two", "length", 2)
            indices = [delta.index async for delta in engine.generate("a b", SamplingParams(n=2))]
            assert indices == [0, 0, 1, 1]
            with pytest.raises(NotFound):
                await engine.generate_all(["a"], lora="nobody")
            with pytest.raises(InvalidRequest):
                await engine.generate_all([""])
            with pytest.raises(InvalidRequest, match="n=1"):
                await engine.generate_all(["a"], SamplingParams(n=2))

    asyncio.run(main())


def test_adapters_are_loaded_pinned_and_unloaded() -> None:
    async def main() -> None:
        async with FakeEngine(lambda text, lora: f"{lora} {text}", adapters=["a"]) as engine:
            card = await engine.load_lora_adapter("b", "some/where", pinned=True)
            assert (card.name, card.path, card.pinned, card.state) == ("b", "some/where", True, "resident")
            with pytest.raises(InvalidRequest, match="already been loaded"):
                await engine.load_lora_adapter("b", "some/where")
            again = await engine.load_lora_adapter("b", "else/where", load_inplace=True)
            assert again.adapter_id > card.adapter_id
            assert not (await engine.unpin_lora_adapter("b")).pinned
            (answer,) = await engine.generate_all(["x"], lora=LoRARequest("c", 9, "c/path"))
            assert answer.text == "c x"
            await engine.unload_lora_adapter("b")
            assert [card.name for card in await engine.adapters()] == ["a", "c"]
            for call in (engine.unload_lora_adapter, engine.pin_lora_adapter):
                with pytest.raises(NotFound):
                    await call("b")

    asyncio.run(main())


def test_fake_is_open_between_enter_and_exit_only() -> None:
    async def run() -> None:
        engine = FakeEngine()
        for _ in range(2):
            for call in (engine.generate_all(["x"]), engine.adapters(), engine.info()):
                with pytest.raises(EngineDead, match="not open"):
                    await call
            async with engine:
                assert [answer.text for answer in await engine.generate_all(["x"])] == ["x"]

    asyncio.run(run())
