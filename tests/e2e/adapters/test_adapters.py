"""Adapters are loaded, re-pointed, mixed and unloaded during requests: tokens always equal transformers + PEFT."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fixtures.adapters.broken_adapters import BROKEN
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.serving.running import RunningServer

from engine import Engine, InvalidRequest, LoRARequest, NotFound, SamplingParams

pytestmark = pytest.mark.e2e

NEW_TOKENS = 8
TURNS = 100
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "targets": ["q_proj", "v_proj"]},
    "two": {"r": 16, "targets": "all-linear"},
    "three": {"r": 8, "targets": ["q_proj", "v_proj", "o_proj"], "rslora": True},
}
MIXES: dict[str, dict[str, float]] = {
    "warm": {"one": 0.7, "three": 0.3},
    "cold": {"one": -0.5, "three": 1.5},
}


class World:
    """A model, adapters, and prompts where the oracle's margin is clear with every adapter."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model = model
        self.paths = {
            name: make_adapter(model, directory / name, seed=seed, **options)
            for seed, (name, options) in enumerate(ADAPTERS.items(), start=1)
        }
        self.oracle = Oracle(model, self.paths)
        for name, scales in MIXES.items():
            self.oracle.mix(name, scales)
        draw = random.Random(5)
        self.prompts: list[list[int]] = []
        while len(self.prompts) < 4:
            prompt = [draw.randrange(6, VOCAB) for _ in range(draw.choice([3, 9, 17]))]
            names = [None, *ADAPTERS, *MIXES]
            if all(self.oracle.is_unambiguous(prompt, NEW_TOKENS, name) for name in names):
                self.prompts.append(prompt)

    def expected(self, prompt: list[int], name: str | None) -> list[int]:
        return self.oracle.greedy(prompt, NEW_TOKENS, name)


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_model("qwen3"), tmp_path_factory.mktemp("voices"))


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[RunningServer]:
    flags = ["--model-path", world.model, "--dtype", "float32", "--enable-lora", "--max-lora-rank", 16]
    with RunningServer(*flags, "--max-loras-per-batch", 4) as running:
        yield running


def ask(server: RunningServer, prompt: list[int], lora: Any) -> tuple[int, Any]:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return server.post("/generate", {"input_ids": prompt, "lora_path": lora, "sampling_params": params})


def tokens(server: RunningServer, prompt: list[int], lora: Any) -> list[int]:
    status, answer = ask(server, prompt, lora)
    assert status == 200, answer
    return list(answer["output_ids"])


def load(server: RunningServer, name: str, path: Path, **fields: Any) -> None:
    status, answer = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})
    assert (status, answer["success"]) == (200, True), answer
    assert answer["loaded_adapters"][name] == str(path)


def unload(server: RunningServer, name: str) -> None:
    status, answer = server.post("/unload_lora_adapter", {"lora_name": name})
    assert (status, answer["success"]) == (200, True), answer
    assert "state" not in answer


def wait_free(server: RunningServer) -> None:
    """Waits until no adapter holds device or host memory."""
    stats: dict[str, Any] = {}
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stats = server.wait_idle()
        left = [*stats["rank_pages_used"].values(), len(stats["resident"]), stats["host_adapters"], stats["host_bytes"]]
        if not any(left):
            return
        time.sleep(0.1)
    raise AssertionError(f"not free: {stats}")


def test_loaded_adapter_answers_and_unloaded_one_is_gone(server: RunningServer, world: World) -> None:
    prompt = world.prompts[0]
    assert ask(server, prompt, "one")[0] == 404
    for name, path in world.paths.items():
        load(server, name, path, preload=True)
        assert tokens(server, prompt, name) == world.expected(prompt, name)
    cards = {card["id"]: card for card in server.get("/v1/models")["data"]}
    assert [cards[name]["state"] for name in world.paths] == ["resident"] * 3
    assert [cards[name]["lora_rank"] for name in world.paths] == [4, 16, 8]
    assert len({cards[name]["revision"] for name in world.paths}) == 3
    for name, scales in MIXES.items():
        for each in world.prompts:
            assert tokens(server, each, scales) == world.expected(each, name), name
    assert tokens(server, prompt, None) == world.expected(prompt, None)
    for name in world.paths:
        unload(server, name)
        assert ask(server, prompt, name)[0] == 404
    assert tokens(server, prompt, None) == world.expected(prompt, None)
    wait_free(server)
    assert [card["id"] for card in server.get("/v1/models")["data"]] == [cards["one"]["parent"]]


def test_name_is_repointed_100_times_under_traffic(server: RunningServer, world: World) -> None:
    """Every output equals that of one of the two revisions; requests for other names are not affected."""
    revisions = ["one", "two"]
    allowed = {
        (tuple(prompt), name): world.expected(prompt, name)
        for prompt in world.prompts
        for name in (*revisions, "three")
    }
    seen: dict[str, int] = dict.fromkeys(revisions, 0)

    async def client(session: aiohttp.ClientSession, number: int, stop: asyncio.Event) -> None:
        params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        while not stop.is_set():
            prompt = world.prompts[number % len(world.prompts)]
            name = "still" if number % 3 == 0 else "moving"
            body = {"input_ids": prompt, "lora_path": name, "sampling_params": params}
            async with session.post("/generate", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
            got = answer["output_ids"]
            if name == "still":
                assert got == allowed[tuple(prompt), "three"]
            else:
                (which,) = [each for each in revisions if allowed[tuple(prompt), each] == got]
                seen[which] += 1
            number += 5

    async def move(session: aiohttp.ClientSession) -> None:
        for turn in range(TURNS):
            path = str(world.paths[revisions[(turn + 1) % 2]])
            body = {"lora_name": "moving", "lora_path": path, "load_inplace": True}
            async with session.post("/v1/load_lora_adapter", json=body) as response:
                text = await response.text()
                assert (response.status, text) == (200, "Success: LoRA adapter 'moving' added successfully.")

    async def main() -> None:
        stop = asyncio.Event()
        async with aiohttp.ClientSession(server.url) as session, asyncio.timeout(180):
            clients = [asyncio.ensure_future(client(session, number, stop)) for number in range(5)]
            await move(session)
            stop.set()
            await asyncio.gather(*clients)

    load(server, "moving", world.paths["one"])
    load(server, "still", world.paths["three"])
    asyncio.run(main())
    assert min(seen.values()) > 5, seen
    assert tokens(server, world.prompts[0], "moving") == world.expected(world.prompts[0], "one")
    assert [card["id"] for card in server.get("/v1/models")["data"]][1:] == ["moving", "still"]
    unload(server, "moving")
    unload(server, "still")
    wait_free(server)


def test_broken_adapters_do_not_disturb_other_requests(server: RunningServer, world: World, tmp_path: Path) -> None:
    prompt = world.prompts[1]
    load(server, "good", world.paths["one"])
    for number, (kind, spoil) in enumerate(BROKEN.items()):
        path = shutil.copytree(world.paths["one"], tmp_path / str(number))
        spoil(path)
        body = {"lora_name": kind, "lora_path": str(path)}
        status, answer = server.post("/v1/load_lora_adapter", body)
        assert (status, set(answer)) == (400, {"error"}), (kind, answer)
        assert kind in answer["error"]["message"]
        status, answer = server.post("/load_lora_adapter", body)
        assert (status, answer["success"], list(answer["loaded_adapters"])) == (400, False, ["good"])
        status, answer = server.post("/v1/load_lora_adapter", body | {"lora_name": "good", "load_inplace": True})
        assert status == 400
        assert ask(server, prompt, kind)[0] == 404
        assert tokens(server, prompt, "good") == world.expected(prompt, "one")
    load(server, "cut", world.paths["two"])  # the name of a failed load can be used again
    assert tokens(server, prompt, "cut") == world.expected(prompt, "two")
    unload(server, "cut")
    unload(server, "good")
    wait_free(server)


def test_lora_roots_admin_key_and_resolve_root(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests --lora-root with a hub cache in huggingface_hub's layout, --lora-resolve-root, and the admin key."""
    for name in ("one", "two"):
        shutil.copytree(world.paths[name], tmp_path / "voices" / name)
    shutil.copytree(world.paths["one"], tmp_path / "outside")
    commit = "0123456789abcdef0123456789abcdef01234567"
    _cache(tmp_path / "hub", world.paths["three"], commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("CHORUS_ADMIN_API_KEY", "opensesame")
    flags = ["--model-path", world.model, "--dtype", "float32", "--max-lora-rank", 16, "--lora-paths", "hub=org/three"]
    roots = ["--lora-root", tmp_path / "voices", "--lora-resolve-root", tmp_path / "voices"]
    prompt = world.prompts[2]
    with RunningServer(*flags, *roots, "--lora-target-modules", "all") as server:
        assert f"org/three@{commit}" in server.log()
        assert tokens(server, prompt, "hub") == world.expected(prompt, "three")
        assert tokens(server, prompt, "two") == world.expected(prompt, "two")
        assert tokens(server, prompt, {"one": 0.7, "hub": 0.3}) == world.expected(prompt, "warm")
        for name in ("../outside", "nobody", "outside"):
            assert ask(server, prompt, name)[0] == 404

        async def knock(path: str, key: str | None) -> tuple[int, str]:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            body = {"lora_name": "x", "lora_path": path}
            async with (
                aiohttp.ClientSession(server.url, headers=headers) as session,
                session.post("/v1/load_lora_adapter", json=body) as response,
            ):
                return response.status, await response.text()

        for path, key, status in (
            (str(tmp_path / "voices" / "one"), None, 401),
            (str(tmp_path / "voices" / "one"), "wrong", 401),
            (str(tmp_path / "outside"), "opensesame", 400),
            (f"org/three@{commit}", "opensesame", 200),
        ):
            got, text = asyncio.run(knock(path, key))
            assert got == status, text
        assert tokens(server, prompt, "x") == world.expected(prompt, "three")

        async def info(key: str) -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {key}"}
            async with (
                aiohttp.ClientSession(server.url, headers=headers) as session,
                session.get("/server_info") as response,
            ):
                return response.status, await response.text()

        assert asyncio.run(info("wrong"))[0] == 401
        status, text = asyncio.run(info("opensesame"))
        assert status == 200
        assert "opensesame" not in text


def _cache(cache: Path, adapter: Path, commit: str) -> None:
    """Stores the adapter as huggingface_hub does: snapshots with symlinks into blobs."""
    repo = cache / "models--org--three"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(adapter.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (repo / "snapshots" / commit / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)


def test_embedded_engine_loads_pins_and_unloads(world: World) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    prompt = world.prompts[3]

    async def main() -> None:
        flags = {"dtype": "float32", "enable_lora": True, "max_lora_rank": 16, "max_loras_per_batch": 2}
        async with Engine(str(world.model), **flags) as engine:
            two = LoRARequest("two", 7, str(world.paths["two"]))
            answers = await engine.generate_all([prompt] * 6, params, lora=two)
            assert {tuple(answer.token_ids) for answer in answers} == {tuple(world.expected(prompt, "two"))}
            card = await engine.load_lora_adapter("one", str(world.paths["one"]), pinned=True, preload=True)
            assert (card.state, card.pinned, card.lora_rank) == ("resident", True, 4)
            with pytest.raises(InvalidRequest, match="starvation"):
                await engine.pin_lora_adapter("two")
            await engine.unpin_lora_adapter("one")
            assert (await engine.pin_lora_adapter("two")).pinned
            stream = engine.generate(
                prompt, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True), lora="one"
            )
            first = await anext(stream)
            moved = await engine.load_lora_adapter("one", str(world.paths["three"]), load_inplace=True)
            assert moved.adapter_id > card.adapter_id
            rest = [token async for delta in stream for token in delta.token_ids]
            assert [*first.token_ids, *rest] == world.expected(prompt, "one")
            (answer,) = await engine.generate_all([prompt], params, lora="one")
            assert answer.token_ids == world.expected(prompt, "three")
            with pytest.raises(InvalidRequest, match="loaded from"):
                await engine.generate_all([prompt], params, lora=LoRARequest("one", 1, str(world.paths["one"])))
            with pytest.raises(NotFound, match="No adapter found"):
                await engine.load_lora_adapter("ghost", "/no/such")
            for name in ("one", "two"):
                await engine.unload_lora_adapter(name)
            assert await engine.adapters() == []
            # `two` was unloaded: the request loads it again
            (answer,) = await engine.generate_all([prompt], params, lora=two)
            assert answer.token_ids == world.expected(prompt, "two")

    asyncio.run(main())
