"""Loads, unloads and pins with a scheduler that carries them out: names, order, races, failures."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.serving.loading_front import LoadingFront, adapter_dir

from engine.config.process_configs import AdapterSource
from engine.errors import AdapterError, EngineDead, EngineError, InvalidRequest, NotFound, Overloaded, StorageFailed
from engine.journal.journal import Journal
from engine.journal.memory_file import MemoryFile
from engine.messages import AdapterState, SamplingParams, Submit
from tokenizer_proc.adapters import calls as calls_module
from tokenizer_proc.adapters import lifecycle as lifecycle_module
from tokenizer_proc.adapters.lifecycle import LoadRequest
from tokenizer_proc.adapters.tokenizers import CHANGED, TextTools

JournalFiles = Callable[[list[AdapterSource]], list[MemoryFile]]


@pytest.fixture
def journal_files() -> Iterator[JournalFiles]:
    """Returns a function that creates the files of a journal in which these adapters have their names."""
    with contextlib.ExitStack() as opened:

        def create(sources: list[AdapterSource]) -> list[MemoryFile]:
            files = [opened.enter_context(MemoryFile.created("adapters")) for _ in range(2)]
            Journal.create(files, sources)
            return files

        yield create


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(work(), 20)

    return asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def stages(world: LoadingFront) -> dict[str, str]:
    return {card.name: card.state for card in world.front.adapters.cards()}


async def ask(world: LoadingFront, name: str) -> int:
    """Returns the id of the adapter with which a request for `name` was sent."""
    submit = Submit(id=1, prompt="hi", params=SamplingParams(max_tokens=1, temperature=0.0), lora=name)
    async with world.front.open(submit) as stream:
        (token,) = [token async for delta in stream for token in delta.token_ids]
        return token - 10


def test_a_load_makes_a_name_and_an_unload_takes_it(tmp_path: Path) -> None:
    world = LoadingFront("first")
    path = str(adapter_dir(tmp_path / "a"))

    async def work() -> None:
        lifecycle = world.front.lifecycle
        entry = await lifecycle.load(LoadRequest(name="a", path=path))
        assert (entry.source.adapter_id, entry.source.path, entry.source.root) == (2, path, path)
        assert stages(world) == {"first": "host", "a": "host"}
        (load,) = world.loads()[1:]
        assert (load.adapter_id, load.path, load.name, load.pinned, load.preload) == (2, path, "a", False, False)
        assert await ask(world, "a") == 2
        world.busy = {2}
        assert await lifecycle.unload("a") is entry
        with pytest.raises(NotFound):
            await ask(world, "a")
        assert stages(world) == {"first": "host", "a": "draining"}
        world.free(2)
        assert await lifecycle.freed(entry)
        assert stages(world) == {"first": "host"}
        assert (await lifecycle.load(LoadRequest(name="a", path=path))).source.adapter_id == 3  # an id is never reused

    run(work)


def test_roots_go_with_the_adapter_to_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal_files: JournalFiles
) -> None:
    """The runner gets the roots with the load, a new scheduler with the repeated load, a successor from the journal."""
    roots = [str(tmp_path)]
    journal = journal_files([])
    world = LoadingFront(lora_roots=roots, journal=[file.descriptor for file in journal])
    library, read = world.front.tokenizer_library, list[tuple[str, list[str]]]()

    def load(name: str, root: str, roots: list[str]) -> TextTools:
        read.append((root, roots))
        return library.base

    monkeypatch.setattr(library, "load", load)

    async def work() -> None:
        await world.front.lifecycle.load(LoadRequest(name="a", path=str(adapter_dir(tmp_path / "a"))))
        world.front.adapters.load(world.sent.append)

    run(work)
    assert [load.roots for load in world.loads()] == [roots, roots]
    assert read == [(str(tmp_path / "a"), roots)]
    assert [source.roots for source in Journal(journal).sources] == [roots]


def test_a_successor_serves_no_other_text_tools(tmp_path: Path, journal_files: JournalFiles) -> None:
    """The weights are the same, so the scheduler reports the adapter as loaded; its requests fail all the same."""
    journal = journal_files([])
    descriptors = [file.descriptor for file in journal]
    for name in ("kept", "bare", "changed"):
        adapter_dir(tmp_path / name)
    for name in ("kept", "changed"):
        (tmp_path / name / "generation_config.json").write_text('{"temperature": 0.5}')
    first = LoadingFront(journal=descriptors)

    async def load() -> None:
        for name in ("kept", "bare", "changed"):
            await first.front.lifecycle.load(LoadRequest(name=name, path=str(tmp_path / name)))

    run(load)
    (tmp_path / "changed" / "generation_config.json").write_text('{"temperature": 0.25}')
    second = LoadingFront(sources=Journal(journal).sources, epoch=1, journal=descriptors)
    assert stages(second) == {"kept": "host", "bare": "host", "changed": "failed"}
    assert second.front.adapters.accept_failed() == [f"adapter `changed`: {CHANGED}"]

    async def work() -> None:
        with pytest.raises(AdapterError, match=r"`changed`: its tokenizer, chat template or .* load it again"):
            await ask(second, "changed")
        assert await ask(second, "kept")
        await second.front.lifecycle.load(LoadRequest(name="changed", path=str(tmp_path / "changed")))
        assert stages(second)["changed"] == "host"

    run(work)
    assert stages(LoadingFront(sources=Journal(journal).sources, epoch=2, journal=descriptors))["changed"] == "host"


def test_preload_waits_for_pages_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "PRELOAD_SECONDS", 0.05)
    world = LoadingFront()

    async def work() -> None:
        lifecycle = world.front.lifecycle
        entry = await lifecycle.load(LoadRequest(name="a", path=str(adapter_dir(tmp_path / "a")), preload=True))
        assert entry.stage == "resident"
        assert world.loads()[0].preload
        world.resident = False
        assert (
            await lifecycle.load(LoadRequest(name="b", path=str(adapter_dir(tmp_path / "b")), preload=True))
        ).stage == "host"

    run(work)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must be provided"),
        ("base", "conflicts with a served base model"),
        ("base:sql", "conflicts with a served base model.*'sql'"),
        ("base:", "conflicts with a served base model"),
        ("x" * 257, "at most 256"),
        ("a\nb", "printable"),
        ("a\x00", "printable"),
        (" ", "spaces"),
        ("sql ", "spaces"),
    ],
)
def test_invalid_names_are_refused(name: str, message: str, tmp_path: Path) -> None:
    world = LoadingFront()

    async def work() -> None:
        with pytest.raises(InvalidRequest, match=message) as refusal:
            await world.front.lifecycle.load(LoadRequest(name=name, path=str(adapter_dir(tmp_path / "a"))))
        assert refusal.value.param == "lora_name"
        assert world.loads() == []

    run(work)


def test_calls_without_lora_enabled_say_how_to_enable_it() -> None:
    world = LoadingFront(enable_lora=False)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: world.front.lifecycle.load(LoadRequest(name="a", path="/p")),
        lambda: world.front.lifecycle.unload("a"),
        lambda: world.front.lifecycle.pin("a", True),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match="--enable-lora"):
            run(call)


def test_a_failed_load_leaves_nothing(tmp_path: Path) -> None:
    world = LoadingFront("first")
    path = str(adapter_dir(tmp_path / "a"))
    world.refuse[path] = "tensor 'x' holds NaN or infinity"

    async def work() -> None:
        lifecycle = world.front.lifecycle
        with pytest.raises(AdapterError, match="`a`: tensor 'x' holds NaN") as refusal:
            await lifecycle.load(LoadRequest(name="a", path=path))
        assert refusal.value.param == "lora_path"
        with pytest.raises(NotFound, match="No adapter found for /no/such"):
            await lifecycle.load(LoadRequest(name="a", path="/no/such"))
        with pytest.raises(NotFound, match=r"there is no adapter_config\.json in it"):
            await lifecycle.load(LoadRequest(name="a", path=str(tmp_path)))
        await until(lambda: world.front.adapters.entry(2) is None)
        assert stages(world) == {"first": "host"}
        assert world.unloads() == [2]
        world.refuse.clear()
        assert (await lifecycle.load(LoadRequest(name="a", path=path))).source.adapter_id == 3
        assert b"chorus:adapter_load_failures_total" in world.front.metrics.render()
        assert 'chorus:adapter_load_failures_total{model_name="base"} 3.0' in world.front.metrics.render().decode()

    run(work)


def test_a_failure_that_is_told_twice_counts_once() -> None:
    world = LoadingFront("first")
    failed = AdapterState(adapter_id=1, state="failed", revision="r", error="it is set aside")
    for _ in range(2):
        world.front.handle(failed)
    assert 'chorus:adapter_load_failures_total{model_name="base"} 1.0' in world.front.metrics.render().decode()


def test_a_name_that_is_being_loaded_cannot_be_used_yet(tmp_path: Path) -> None:
    world = LoadingFront()
    world.held = True

    async def work() -> None:
        load = asyncio.ensure_future(
            world.front.lifecycle.load(LoadRequest(name="a", path=str(adapter_dir(tmp_path / "a"))))
        )
        await until(lambda: world.open_loads)
        assert stages(world) == {}
        with pytest.raises(NotFound, match="still loading"):
            await ask(world, "a")
        world.finish()
        await load
        assert await ask(world, "a") == 1

    run(work)


def test_a_taken_name_is_refused_or_re_pointed(tmp_path: Path) -> None:
    world = LoadingFront("a")
    one, two, broken = (str(adapter_dir(tmp_path / name)) for name in ("one", "two", "broken"))
    world.refuse[broken] = "cut file"
    world.busy = {1}

    async def work() -> None:
        lifecycle = world.front.lifecycle
        with pytest.raises(InvalidRequest, match=r"has already been loaded\. If you want"):
            await lifecycle.load(LoadRequest(name="a", path=one))
        with pytest.raises(AdapterError, match="cut file"):
            await lifecycle.load(LoadRequest(name="a", path=broken, load_inplace=True))
        assert await ask(world, "a") == 1
        world.held = True
        load = asyncio.ensure_future(lifecycle.load(LoadRequest(name="a", path=one, load_inplace=True)))
        await until(lambda: world.open_loads)
        assert await ask(world, "a") == 1  # the name refers to the old adapter until the new one is loaded
        world.finish()
        entry = await load
        assert await ask(world, "a") == entry.source.adapter_id == 3
        assert [(card.adapter_id, card.state) for card in world.front.adapters.cards()] == [(3, "host")]
        assert world.front.adapters.paths() == {"a": one}
        world.free(1)
        world.held = False
        assert (await lifecycle.load(LoadRequest(name="a", path=two, load_inplace=True))).source.adapter_id == 4
        assert world.unloads() == [2, 1, 3]

    run(work)


def test_an_adapter_that_was_lost_can_be_loaded_again(tmp_path: Path) -> None:
    world = LoadingFront("a")
    path = str(adapter_dir(tmp_path / "a"))

    async def work() -> None:
        world.front.handle(AdapterState(adapter_id=1, state="failed", revision="r", error="its files are gone"))
        with pytest.raises(AdapterError, match="its files are gone"):
            await ask(world, "a")
        await world.front.lifecycle.load(LoadRequest(name="a", path=path))
        assert await ask(world, "a") == 2

    run(work)


def test_calls_about_one_name_happen_in_order(tmp_path: Path) -> None:
    world = LoadingFront()
    path = str(adapter_dir(tmp_path / "a"))
    world.held = True

    async def work() -> None:
        lifecycle = world.front.lifecycle
        calls: list[Awaitable[Any]] = [
            lifecycle.load(LoadRequest(name="a", path=path)),
            lifecycle.load(LoadRequest(name="a", path=path)),
            lifecycle.unload("a"),
            lifecycle.unload("a"),
            lifecycle.load(LoadRequest(name="a", path=path)),
        ]
        tasks = []
        for call in calls:
            tasks.append(asyncio.ensure_future(call))
            await asyncio.sleep(0)
        for _ in range(2):
            await until(lambda: world.open_loads)
            assert len(world.open_loads) == 1
            world.finish()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = [type(each).__name__ for each in done]
        assert kinds == ["Entry", "InvalidRequest", "Entry", "NotFound", "Entry"]
        assert await ask(world, "a") == 2
        assert len(lifecycle.names) == 0

    run(work)


def test_different_names_load_side_by_side_but_not_all_at_once(tmp_path: Path) -> None:
    world = LoadingFront()
    world.held = True
    most = lifecycle_module.LOADS_AT_ONCE
    paths = [str(adapter_dir(tmp_path / str(number))) for number in range(most + 3)]

    async def work() -> None:
        lifecycle = world.front.lifecycle
        tasks = [
            asyncio.ensure_future(lifecycle.load(LoadRequest(name=f"n{i}", path=path))) for i, path in enumerate(paths)
        ]
        await until(lambda: len(world.open_loads) == most)
        await asyncio.sleep(0.05)
        assert len(world.open_loads) == most
        world.held = False
        world.finish()
        await asyncio.gather(*tasks)
        assert set(stages(world)) == {f"n{i}" for i in range(most + 3)}

    run(work)


def test_a_caller_that_leaves_does_not_stop_a_load(tmp_path: Path) -> None:
    world = LoadingFront()
    world.held = True

    async def work() -> None:
        lifecycle = world.front.lifecycle
        load = asyncio.ensure_future(lifecycle.load(LoadRequest(name="a", path=str(adapter_dir(tmp_path / "a")))))
        await until(lambda: world.open_loads)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        world.finish()
        await until(lambda: world.front.adapters.find("a"))
        assert await ask(world, "a") == 1

    run(work)


def test_calls_whose_callers_left_hold_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its LoadAdapter is sent, a load that nobody waits for is dropped: here in a download, or behind one."""
    monkeypatch.setattr(calls_module, "CALLS_AT_ONCE", 4)
    go = threading.Event()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: go.wait(10))
    world = LoadingFront("first")
    path = str(adapter_dir(tmp_path / "a"))

    async def work() -> None:
        lifecycle = world.front.lifecycle
        left = [asyncio.ensure_future(lifecycle.load(LoadRequest(name=name, path="org/x"))) for name in ("a", "b")]
        left.append(asyncio.ensure_future(lifecycle.load(LoadRequest(name="a", path=path))))
        left.append(asyncio.ensure_future(lifecycle.unload("a")))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="too many"):
            await lifecycle.load(LoadRequest(name="c", path=path))
        for call in left:
            call.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await until(lambda: len(lifecycle.names) == 0)
        for name in ("a", "b", "c", "d", "e"):
            await lifecycle.load(LoadRequest(name=name, path=path))
        assert [load.name for load in world.loads()[1:]] == ["a", "b", "c", "d", "e"]
        go.set()

    run(work)


def test_a_fault_of_the_server_is_no_fault_of_the_adapter(tmp_path: Path) -> None:
    world = LoadingFront()
    world.held = True

    async def work() -> None:
        load = asyncio.ensure_future(
            world.front.lifecycle.load(LoadRequest(name="a", path=str(adapter_dir(tmp_path / "a"))))
        )
        await until(lambda: world.open_loads)
        error = "adapter 'a': Input/output error"
        world.front.handle(AdapterState(adapter_id=1, state="failed", error=error, server_fault=True))
        with pytest.raises(StorageFailed, match="'a': Input/output error") as failure:
            await load
        assert failure.value.status == 503

    run(work)


def test_waiting_calls_end_with_an_error_at_shutdown(tmp_path: Path) -> None:
    world = LoadingFront()
    world.held = True

    async def work() -> None:
        lifecycle = world.front.lifecycle
        load = asyncio.ensure_future(lifecycle.load(LoadRequest(name="a", path=str(adapter_dir(tmp_path / "a")))))
        await until(lambda: world.open_loads)
        await world.front.drain(0.1)
        with pytest.raises(EngineDead):
            await load
        assert world.unloads() == [1]
        with pytest.raises(Overloaded):
            await lifecycle.load(LoadRequest(name="b", path="/p"))

    run(work)


def test_too_many_open_calls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CALLS_AT_ONCE", 2)
    world = LoadingFront()
    world.held = True
    path = str(adapter_dir(tmp_path / "a"))

    async def work() -> None:
        lifecycle = world.front.lifecycle
        open_calls = [asyncio.ensure_future(lifecycle.load(LoadRequest(name=name, path=path))) for name in "ab"]
        await until(lambda: len(world.open_loads) == 2)
        with pytest.raises(Overloaded, match="too many"):
            await lifecycle.load(LoadRequest(name="c", path=path))
        world.finish()
        await asyncio.gather(*open_calls)

    run(work)


def test_pins_are_bounded_and_can_be_taken_off(tmp_path: Path) -> None:
    world = LoadingFront("a", max_loras=3, max_pinned=2)
    path = str(adapter_dir(tmp_path / "x"))

    async def work() -> None:
        lifecycle, adapters = world.front.lifecycle, world.front.adapters
        await lifecycle.load(LoadRequest(name="b", path=path, pinned=True))
        await lifecycle.pin("a", True)
        await lifecycle.pin("a", True)  # a second pin changes nothing
        assert adapters.pinned() == {"a", "b"}
        for call in (lifecycle.load(LoadRequest(name="c", path=path, pinned=True)), lifecycle.pin("c", True)):
            with pytest.raises(EngineError):
                await call
        await lifecycle.load(LoadRequest(name="c", path=path))
        with pytest.raises(AdapterError, match=r"--max-loras-per-batch 3 allows 2.*starvation") as refusal:
            await lifecycle.pin("c", True)
        assert refusal.value.param == "pinned"
        moved = await lifecycle.load(LoadRequest(name="b", path=path, load_inplace=True))  # a name keeps its pin
        assert moved.source.pinned
        await lifecycle.unload("b")  # a pinned adapter can be unloaded too
        await lifecycle.pin("c", True)
        await lifecycle.pin("c", False)
        assert adapters.pinned() == {"a"}
        assert world.pins() == [(1, True), (1, True), (3, True), (3, False)]
        with pytest.raises(NotFound):
            await lifecycle.pin("b", True)

    run(work)


def test_unload_waits_for_open_streams_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "FREED_SECONDS", 0.05)
    world = LoadingFront("a", "b")
    world.busy = {1}

    async def work() -> None:
        lifecycle = world.front.lifecycle
        with pytest.raises(InvalidRequest, match="has lora_int_id 1, not 2"):
            await lifecycle.unload("a", 2)
        entry = await lifecycle.unload("a", 1)
        assert not await lifecycle.freed(entry)
        assert stages(world) == {"b": "host", "a": "draining"}
        card = world.front.adapters.card("a")
        assert card is not None
        assert card.state == "draining"
        with pytest.raises(NotFound):
            await lifecycle.unload("a")
        world.free(1)
        assert await lifecycle.freed(entry)
        assert stages(world) == {"b": "host"}
        assert "chorus:adapter_unload_seconds_count" in world.front.metrics.render().decode()

    run(work)


def test_a_restarted_scheduler_is_told_everything_again() -> None:
    world = LoadingFront("a", "b")
    world.busy = {2}

    async def work() -> None:
        await world.front.lifecycle.unload("b")
        await until(lambda: world.front.adapters.cards()[-1].state == "draining")
        world.sent.clear()
        assert world.front.capacity is not None
        world.front.handle(world.front.capacity)
        assert [(load.adapter_id, load.revision) for load in world.loads()] == [(1, "r"), (2, "r")]
        assert world.unloads() == [2]

    run(work)


def test_re_pointing_under_traffic_uses_the_old_or_the_new(tmp_path: Path) -> None:
    """A request whose name is re-pointed during its preparation is sent with the adapter that the name gets."""
    world = LoadingFront("a")
    paths = [str(adapter_dir(tmp_path / name)) for name in ("one", "two")]

    async def work() -> None:
        answers: list[int] = []
        stop = asyncio.Event()

        async def traffic() -> None:
            while not stop.is_set():
                answers.append(await ask(world, "a"))

        clients = [asyncio.ensure_future(traffic()) for _ in range(4)]
        for turn in range(50):
            await world.front.lifecycle.load(LoadRequest(name="a", path=paths[turn % 2], load_inplace=True))
        stop.set()
        await asyncio.gather(*clients)
        assert len(set(answers)) > 10
        assert max(answers) <= 51
        with contextlib.suppress(NotFound):
            assert await ask(world, "a") == 51

    run(work)


def test_a_name_that_moves_while_a_prompt_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old adapter may be unloaded before the request is sent, so the request must not name it."""
    world = LoadingFront("a")
    path = str(adapter_dir(tmp_path / "a"))

    async def work() -> None:
        reading, go = asyncio.Event(), asyncio.Event()

        async def slow(*_: Any) -> list[int]:
            reading.set()
            await go.wait()
            return [5, 6]

        monkeypatch.setattr(world.front.texts, "encode", slow)
        request = asyncio.ensure_future(ask(world, "a"))
        await reading.wait()
        assert world.front.adapters.cards()[0].running == 1
        await world.front.lifecycle.load(LoadRequest(name="a", path=path, load_inplace=True))
        await until(lambda: world.front.adapters.entry(1) is None)
        go.set()
        assert await request == 2
        assert world.front.adapters.cards()[0].running == 0

    run(work)
