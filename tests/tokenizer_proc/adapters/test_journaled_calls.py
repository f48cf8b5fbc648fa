"""What a successor of the tokenizer process serves is what was acknowledged, whatever failed and whenever it died."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random

import pytest
from fixtures.journal.faulty_file import Fault, Killed
from fixtures.journal.named_world import NamedWorld

from engine.journal import journal as journal_module

HISTORIES = 1000
NAMES, PATHS = "abcd", "xyz"
CODES = (errno.ENOSPC, errno.EIO, errno.ENOMEM, None)


async def _some_call(world: NamedWorld, draw: random.Random) -> None:
    name = draw.choice(NAMES)
    match draw.randrange(5):
        case 0 | 1:
            await world.load(name, draw.choice(PATHS), pinned=draw.random() < 0.3)
        case 2:
            await world.unload(name)
        case 3:
            await world.pin(name, True)
        case 4:
            await world.pin(name, False)


def _disturb(world: NamedWorld, draw: random.Random) -> None:
    match draw.randrange(4):
        case 0:
            code, sticks = draw.choice(CODES), draw.random() < 0.5
            world.disk.arm(Fault(draw.randrange(2), draw.choice((0, draw.randrange(400), 1 << 20)), code, sticks))
        case 1:
            world.sends_left = draw.randrange(4)
        case 2:
            path = draw.choice(PATHS)
            world.files[path] += "'"
        case 3:
            world.succeed(scheduler_too=draw.random() < 0.5)
            world.check()


async def _history(seed: int) -> int:
    """Makes random calls among failures and deaths, and checks after each death. Returns the number of deaths."""
    draw, deaths = random.Random(seed), 0
    world = NamedWorld({path: path for path in PATHS}, {"a": "x", "b": "x"})
    for _ in range(draw.randrange(3, 16)):
        try:
            if draw.random() < 0.35:
                _disturb(world, draw)
            await _some_call(world, draw)
        except Killed:
            deaths += 1
            world.succeed(scheduler_too=draw.random() < 0.5)
            world.check()
    for scheduler_too in (False, True):
        world.succeed(scheduler_too)
        world.check()
    return deaths


def test_random_histories_keep_what_was_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_FACTOR", 1)

    async def work() -> None:
        deaths = 0
        for seed in range(HISTORIES):
            monkeypatch.setattr(journal_module, "COMPACT_BYTES", (1, 900, 1 << 20)[seed % 3])
            deaths += await _history(seed)
        assert deaths > HISTORIES / 4

    asyncio.run(work())


async def _fixed_history(world: NamedWorld) -> None:
    await world.load("a", "y", pinned=True)
    await world.load("b", "x")
    await world.pin("a", False)
    await world.unload("a")
    await world.load("b", "z")


@pytest.mark.parametrize("compact_bytes", [1, 1 << 20])
def test_a_write_may_fail_at_every_byte(compact_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_FACTOR", 1)
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", compact_bytes)

    async def work() -> None:
        calm = NamedWorld({path: path for path in PATHS}, {"a": "x"})
        await _fixed_history(calm)
        lines = [len(line) + 1 for content in calm.disk.contents for line in bytes(content).splitlines()]
        for write in range(calm.disk.writes):
            for stored in range(max(lines) + 1):
                kinds = [(errno.ENOSPC, False), (errno.EIO, True), (None, False)]
                for code, sticks in kinds if compact_bytes > 1 else kinds[stored % 3 :][:1]:
                    world = NamedWorld({path: path for path in PATHS}, {"a": "x"})
                    world.disk.arm(Fault(write, stored, code, sticks))
                    with contextlib.suppress(Killed):
                        await _fixed_history(world)
                    world.succeed()
                    world.check()

    asyncio.run(work())


def test_the_journal_does_not_grow_with_the_calls() -> None:
    async def work() -> None:
        world = NamedWorld({path: path for path in PATHS}, {"a": "x"})
        for turn in range(4000):
            await world.load("a", PATHS[turn % 2])
            assert sum(map(len, world.disk.contents)) < 2 * journal_module.COMPACT_BYTES
        world.succeed()
        world.check()

    asyncio.run(work())
