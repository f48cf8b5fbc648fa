"""Adapters that are loaded when a request names them, without a load call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.serving.loading_front import LoadingFront, adapter_dir

from engine.errors import AdapterError, ConfigError, EngineError, NotFound
from engine.lora_roots import allowed_roots
from engine.messages import SamplingParams, Submit
from tokenizer_proc.adapters.lifecycle import LoadRequest
from tokenizer_proc.adapters.resolver import Resolver


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(work(), 20)

    return asyncio.run(main())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("one", "two", "three", "broken"):
        adapter_dir(tmp_path / "root" / name)
    return tmp_path / "root"


def world_of(root: Path, most: int = 1000, miss_seconds: float = 5.0) -> LoadingFront:
    world = LoadingFront(lora_resolve_root=str(root))
    resolver = world.front.resolver
    assert resolver is not None
    resolver.most, resolver.miss_seconds = most, miss_seconds
    return world


async def ask(world: LoadingFront, name: str | dict[str, float]) -> int:
    submit = Submit(id=1, prompt="hi", params=SamplingParams(max_tokens=1, temperature=0.0), lora=name)
    async with world.front.open(submit) as stream:
        (token,) = [token async for delta in stream for token in delta.token_ids]
        return token - 10


def test_first_requests_share_one_load(root: Path) -> None:
    world = world_of(root)

    async def work() -> None:
        assert set(await asyncio.gather(*(ask(world, "one") for _ in range(20)))) == {1}
        assert len(world.loads()) == 1
        await ask(world, {"one": 0.5, "two": 0.5})
        assert world.front.adapters.paths() == {"one": str(root / "one"), "two": str(root / "two")}

    run(work)


@pytest.mark.parametrize("model", ["one", "base:one"])
def test_adapters_named_by_model_are_loaded(root: Path, model: str) -> None:
    world = world_of(root)

    async def work() -> None:
        await world.front.fetch(model, None)
        assert world.front.adapters.select(model) == "one"

    run(work)


@pytest.mark.parametrize("name", ["../root/one", "one/", "/etc", ".", "..", ".hidden", "one\\two", "x" * 300, "o\0e"])
def test_names_that_are_paths_stay_unknown(root: Path, name: str) -> None:
    adapter_dir(root / ".hidden")
    world = world_of(root)
    with pytest.raises(NotFound):
        run(lambda: ask(world, name))
    assert world.loads() == []


def test_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    adapter_dir(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "two" / "adapter_config.json").unlink()
    (root / "two" / "adapter_config.json").symlink_to(tmp_path / "outside" / "adapter_config.json")
    world = world_of(root)
    for name in ("link", "two"):
        with pytest.raises(AdapterError, match="outside"):
            run(lambda name=name: ask(world, name))
    assert world.loads() == []


def test_resolved_adapters_stay_under_the_resolve_root(root: Path) -> None:
    world = world_of(root)

    async def work() -> None:
        await ask(world, "one")

    run(work)
    assert [load.roots for load in world.loads()] == [allowed_roots([str(root)])]


def test_misses_and_failures_are_remembered_briefly(root: Path) -> None:
    world = world_of(root, miss_seconds=0.2)
    world.refuse[str(root / "broken")] = "cut file"

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(AdapterError, match="cut file"):
                await ask(world, "broken")
            with pytest.raises(NotFound):
                await ask(world, "later")
        assert len(world.loads()) == 1
        adapter_dir(root / "later")
        world.refuse.clear()
        with pytest.raises(NotFound):
            await ask(world, "later")
        await asyncio.sleep(0.25)
        assert await ask(world, "later") == 2
        assert await ask(world, "broken") == 3

    run(work)


def test_the_least_recently_used_is_unloaded_and_returns(root: Path) -> None:
    world = world_of(root, most=2)

    async def work() -> None:
        for name in ("one", "two", "one", "three"):
            await ask(world, name)
        assert set(world.front.adapters.paths()) == {"one", "three"}
        assert await ask(world, "two") == 4
        assert set(world.front.adapters.paths()) == {"three", "two"}

    run(work)


def test_a_successor_unloads_what_its_predecessor_loaded(root: Path) -> None:
    world = world_of(root)

    async def work() -> None:
        await ask(world, "one")
        successor = Resolver(str(root), world.front.adapters, world.front.lifecycle)
        successor.most = 1
        await successor.fetch("two")
        assert set(world.front.adapters.paths()) == {"two"}

    run(work)


def test_adapters_in_use_or_pinned_stay_loaded(root: Path) -> None:
    world = world_of(root, most=1)

    async def work() -> None:
        await ask(world, "one")
        await world.front.lifecycle.pin("one", True)
        await ask(world, "two")
        with world.front.adapters.resolve("two").held():
            await ask(world, "three")
            assert set(world.front.adapters.paths()) == {"one", "two", "three"}

    run(work)


def test_loads_and_unloads_by_call_take_precedence(root: Path, tmp_path: Path) -> None:
    world = world_of(root, most=1)
    other = str(adapter_dir(tmp_path / "other"))

    async def work() -> None:
        lifecycle = world.front.lifecycle
        await lifecycle.load(LoadRequest(name="one", path=other))
        assert await ask(world, "one") == 1
        await ask(world, "two")
        await ask(world, "three")
        assert set(world.front.adapters.paths()) == {
            "one",
            "three",
        }  # adapters loaded by a call do not count for the limit
        await lifecycle.unload("three")
        assert await ask(world, "three") == 4  # loaded again, because its directory still exists

    run(work)


def test_a_cancelled_request_does_not_cancel_a_shared_load(root: Path) -> None:
    world = world_of(root)
    world.held = True

    async def work() -> None:
        first, second = (asyncio.ensure_future(ask(world, "one")) for _ in range(2))
        while not world.open_loads:
            await asyncio.sleep(0.002)
        text = world.front.metrics.render().decode()
        assert 'running_lora_adapters="",waiting_lora_adapters="one"' in text
        first.cancel()
        world.finish()
        assert await second == 1

    run(work)


def test_a_root_that_is_no_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="--lora-resolve-root /no/such"):
        LoadingFront(lora_resolve_root="/no/such")


def test_names_of_the_form_base_adapter_are_never_looked_for(root: Path) -> None:
    adapter_dir(root / "base:one")
    world = world_of(root)

    async def work() -> None:
        await world.front.fetch("base:one", "base:one")
        assert [load.name for load in world.loads()] == ["one"]
        with pytest.raises(NotFound):
            await ask(world, "base:one")

    run(work)


@pytest.mark.parametrize("model", ["one", "base:one", None])
def test_adapters_that_a_key_may_not_use_are_not_loaded(root: Path, model: str | None) -> None:
    world = world_of(root)

    async def work() -> None:
        loras = ["one", {"one": 1.0}] if model is None else [None]
        await world.front.fetch(model, *loras, may_use=lambda name: name != "one")
        assert world.loads() == []
        await world.front.fetch(model, *loras, may_use=lambda name: name == "one")
        assert len(world.loads()) == 1

    run(work)


def test_base_names_are_never_looked_for(root: Path) -> None:
    adapter_dir(root / "base")
    world = world_of(root)

    async def work() -> None:
        await world.front.fetch("base", None)
        with pytest.raises(EngineError):
            await ask(world, "base")
        assert world.loads() == []

    run(work)
