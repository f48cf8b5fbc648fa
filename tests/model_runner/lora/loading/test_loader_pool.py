"""Loader children as real processes: the adapters they return, how they end, and that they leave nothing behind."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from fixtures.adapters.broken_adapters import BROKEN
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.processes.resources import children, descriptors, private_bytes, shared_bytes
from fixtures.processes.watched import wait_for
from msgspec.structs import replace

from engine.messages import LoadAdapter
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.loading import loader_process
from model_runner.lora.loading.limits import Limits
from model_runner.lora.loading.loader_pool import LoaderPool, LoadOutcome, TimeLimit
from model_runner.lora.loading.messages import LoaderConfig, LoadJob, SiteShape
from model_runner.lora.store import AdapterStore

SITES = random_sites(hidden=256, heads=256, kv=64, inner=512)
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIG = LoaderConfig([SiteShape.of(site) for site in SITES], "float32", Limits(max_rank=32))


def adapter(root: Path, rank: int = 8, **config: object) -> Path:
    return write_adapter(root, plain_tensors(SITES, TARGETS, rank), target_modules=TARGETS, r=rank, **config)


def message(root: Path, adapter_id: int = 1, revision: str = "") -> LoadAdapter:
    return LoadAdapter(adapter_id=adapter_id, path=str(root), revision=revision)


def finish(loaders: LoaderPool, count: int = 1) -> list[LoadOutcome]:
    """Returns the next `count` outcomes."""
    found, deadline = list[LoadOutcome](), time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < deadline
        found += loaders.collect()
        time.sleep(0.002)
    return found


def refused(loaders: LoaderPool, load: LoadAdapter) -> str:
    loaders.submit(load)
    (outcome,) = finish(loaders)
    assert outcome.adapter is None
    assert outcome.message == load
    return outcome.reason


def server_fault(loaders: LoaderPool, load: LoadAdapter) -> bool:
    loaders.submit(load)
    (outcome,) = finish(loaders)
    assert outcome.adapter is None
    return outcome.server_fault


def loads(loaders: LoaderPool, root: Path) -> None:
    loaders.submit(message(root))
    (outcome,) = finish(loaders)
    assert outcome.adapter is not None, outcome.reason
    outcome.adapter.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[LoaderPool]:
    """A pool that is shared by the tests that leave its children alive."""
    loaders = LoaderPool(CONFIG)
    loaders.start()
    yield loaders
    pids = loaders.pids
    loaders.close()
    wait_for(lambda: not set(pids) & set(children()))


@pytest.fixture
def own() -> Iterator[Callable[..., LoaderPool]]:
    """Makes pools for the tests that kill their children."""
    made: list[LoaderPool] = []

    def make(time_limit: TimeLimit = TimeLimit()) -> LoaderPool:  # noqa: B008
        made.append(LoaderPool(CONFIG, time_limit))
        return made[-1]

    yield make
    for loaders in made:
        loaders.close()


def test_child_loads_what_this_process_would_read(shared: LoaderPool, tmp_path: Path) -> None:
    root = adapter(tmp_path)
    shared.submit(message(root))
    assert shared.poll_seconds is not None
    (outcome,) = finish(shared)
    assert shared.poll_seconds is None
    assert outcome.adapter is not None
    manifest, deltas = outcome.adapter.open(Catalogue(SITES), torch.float32)
    expected = AdapterStore(SITES, torch.float32, max_rank=None, targets=None).load(1, "x", root)
    assert manifest.revision == expected.revision
    assert deltas.keys() == expected.deltas.keys()
    for name, slices in expected.deltas.items():
        for ours, theirs in zip(deltas[name], slices, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or (torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b))


def test_child_is_niced_and_bounded_in_memory(shared: LoaderPool, tmp_path: Path) -> None:
    loads(shared, adapter(tmp_path))
    (pid,) = shared.pids
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + 10
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    assert "Max data size" in Path(f"/proc/{pid}/limits").read_text()
    data = next(x for x in Path(f"/proc/{pid}/limits").read_text().splitlines() if x.startswith("Max data size"))
    assert int(data.split()[3]) < 8 << 30


def start(link: socket.socket, words: bytes) -> subprocess.Popen[bytes]:
    """Starts a child without a LoaderProcess, with `words` on its stdin."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "model_runner.lora.loading"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(link.fileno(),),
    )
    assert child.stdin is not None
    child.stdin.write(words)
    child.stdin.flush()
    return child


def test_child_exits_silently_when_replies_are_not_read(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        child = start(theirs, msgspec.json.encode(replace(CONFIG, socket=theirs.fileno())) + b"\n")
    with child:
        with ours:
            for number in range(3):
                ours.send(msgspec.msgpack.encode(LoadJob(number, str(adapter(tmp_path / str(number))))))
            assert select.select([ours], [], [], 60)[0]
        assert child.wait(60) == 0
        assert child.stderr is not None
        assert child.stderr.read() == b""


def test_child_exits_silently_on_a_cut_config() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = start(theirs, msgspec.json.encode(CONFIG)[:-40])
        assert child.communicate(timeout=60) == (None, b"")
        assert child.returncode == 0


REFUSALS = {
    "missing": ("", "no such directory"),
    "rank above the flag": ("rank", "rank 33 is above --max-lora-rank 32"),
    "other revision": ("revision", "its files have changed"),
    "a pipe": ("pipe", "no regular file"),
    "a path without end": ("path", "more than 4096 bytes"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_says_why_and_the_child_lives(case: str, shared: LoaderPool, tmp_path: Path) -> None:
    kind, says = REFUSALS[case]
    load = message(tmp_path / "none")
    if kind in ("rank", "revision"):
        load = message(adapter(tmp_path / "a", 33 if kind == "rank" else 4), revision="0" * 64)
    elif kind == "pipe":
        os.mkfifo(adapter(tmp_path / "a") / "adapter_model.safetensors.index.json")
        (tmp_path / "a" / "adapter_model.safetensors").unlink()
        load = message(tmp_path / "a")
    elif kind == "path":
        load = message(Path("/" + "x" * 100_000))
    pids = shared.pids
    assert says in refused(shared, load)
    assert shared.pids == pids


def test_a_fault_of_the_server_is_marked_as_such(shared: LoaderPool, tmp_path: Path) -> None:
    root = adapter(tmp_path / "a")
    assert not server_fault(shared, message(tmp_path / "none"))
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in shared.pids}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    assert server_fault(shared, message(root))
    for pid, limit in limits.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    loads(shared, root)


def test_roots_are_checked_by_the_child(shared: LoaderPool, tmp_path: Path) -> None:
    root = adapter(tmp_path / "root" / "a")
    load = replace(message(root), roots=[str(tmp_path / "root")])
    shared.submit(load)
    (outcome,) = finish(shared)
    assert outcome.adapter is not None, outcome.reason
    outcome.adapter.close()
    (root / "adapter_model.safetensors").rename(tmp_path / "outside")
    (root / "adapter_model.safetensors").symlink_to(tmp_path / "outside")
    assert "adapter_model.safetensors: lies outside of --lora-root" in refused(shared, load)
    assert "--lora-root directories have more than" in refused(shared, replace(load, roots=["/" + "x" * 4000] * 5))
    loads(shared, root)


def test_broken_adapter_is_refused_and_the_child_lives(shared: LoaderPool, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "whole")
    loads(shared, whole)
    pids, held, opened = shared.pids, max(map(private_bytes, shared.pids)), descriptors()
    for number, (kind, spoil) in enumerate(BROKEN.items()):
        root = shutil.copytree(whole, tmp_path / str(number))
        spoil(root)
        began = time.monotonic()
        reason = refused(shared, message(root, number))
        assert 0 < len(reason) <= 2000, kind
        assert "Error" not in reason, f"{kind}: {reason}"
        assert time.monotonic() - began < 10, kind
    loads(shared, whole)
    assert (shared.pids, descriptors()) == (pids, opened)
    assert max(map(private_bytes, pids)) - held < 64 << 20


def test_hundred_loads_leak_nothing(shared: LoaderPool, tmp_path: Path) -> None:
    roots = [adapter(tmp_path / str(number), rank=number + 1) for number in range(4)]
    for root in roots:
        loads(shared, root)
    pids, before = shared.pids, (descriptors(), shared_bytes(), [descriptors(pid) for pid in shared.pids])
    private = sum(map(private_bytes, pids))
    catalogue = Catalogue(SITES)
    for number in range(100):
        shared.submit(message(roots[number % 4]))
        (outcome,) = finish(shared)
        assert outcome.adapter is not None
        _, deltas = outcome.adapter.open(catalogue, torch.float32)
        assert len(deltas) == 4
        del deltas
    assert shared.pids == pids
    assert (descriptors(), shared_bytes(), [descriptors(pid) for pid in pids]) == before
    assert sum(map(private_bytes, pids)) - private < 8 << 20


def test_loads_of_one_adapter_are_ordered_others_parallel(own: Callable[..., LoaderPool], tmp_path: Path) -> None:
    loaders = own()
    first, second, other = (adapter(tmp_path / name, rank) for name, rank in (("a", 3), ("b", 4), ("c", 5)))
    loaders.start()
    loads(loaders, first)
    (slow,) = loaders.pids
    os.kill(slow, signal.SIGSTOP)
    loaders.submit(message(first, 1))
    loaders.submit(message(second, 1))
    loaders.submit(message(other, 2))
    (outcome,) = finish(loaders)
    assert outcome.message.path == str(other)
    assert len(loaders.pids) == 2
    assert loaders.collect() == []
    os.kill(slow, signal.SIGCONT)
    assert [o.message.path for o in finish(loaders, 2)] == [str(first), str(second)]


def test_closed_pool_has_no_children(own: Callable[..., LoaderPool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_process, "END_SECONDS", 0.0)  # of a child that is lost while others load
    loaders = own()
    loaders.start()
    (pid,) = loaders.pids
    loaders.close()
    assert pid not in children()


def test_killed_child_fails_its_load_only(own: Callable[..., LoaderPool], tmp_path: Path) -> None:
    loaders, root = own(), adapter(tmp_path)
    opened = descriptors()
    loads(loaders, root)
    (pid,) = loaders.pids
    os.kill(pid, signal.SIGKILL)  # the child is idle, so there is no outcome
    while loaders.pids:
        assert loaders.collect() == []
    loads(loaders, root)
    (pid,) = loaders.pids
    os.kill(pid, signal.SIGSTOP)
    loaders.submit(message(root, 7))
    os.kill(pid, signal.SIGKILL)
    (outcome,) = finish(loaders)
    assert (outcome.message.adapter_id, outcome.reason) == (7, "the loader process was killed by signal 9")
    assert descriptors() <= opened + 1  # one more for the selector
    assert pid not in children()


def test_load_that_takes_too_long_is_stopped(own: Callable[..., LoaderPool], tmp_path: Path) -> None:
    loaders = own()
    good = adapter(tmp_path / "good")
    bad = adapter(tmp_path / "bad")
    fields = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": "(([a-z.]*)*)*[0-9]!"}))
    loads(loaders, good)
    loaders.time_limit = TimeLimit(seconds=0.5)
    began = time.monotonic()
    assert refused(loaders, message(bad)) == "loading took longer than 0.5 s and was stopped"
    assert time.monotonic() - began < 10
    loaders.time_limit = TimeLimit()
    loads(loaders, good)


def test_time_limit_grows_with_the_bytes_to_read(own: Callable[..., LoaderPool], tmp_path: Path) -> None:
    loaders, root = own(), adapter(tmp_path)
    loads(loaders, root)
    loaders.time_limit = TimeLimit(seconds=50.0, rate=1000.0)
    began = time.monotonic()
    loaders.submit(message(root))
    (load,) = loaders._busy
    latest = load.deadline
    while loaders.poll_seconds is not None:
        for outcome in loaders.collect():
            assert outcome.adapter is not None
            outcome.adapter.close()
        latest = max(latest, load.deadline)
    size = (root / "adapter_model.safetensors").stat().st_size
    assert latest - began > 50 + 0.9 * size / 1000


def test_cancelled_load_gives_no_outcome(shared: LoaderPool, tmp_path: Path) -> None:
    root = adapter(tmp_path)
    opened = descriptors() - 2 * len(shared.pids)
    shared.submit(message(root, 5))
    shared.submit(message(root, 5))
    shared.cancel(5)
    loads(shared, root)
    while shared.poll_seconds is not None:
        assert shared.collect() == []
    assert descriptors() - 2 * len(shared.pids) == opened


def test_same_load_twice_gives_one_outcome(shared: LoaderPool, tmp_path: Path) -> None:
    root = adapter(tmp_path)
    shared.submit(message(root, 6))
    shared.submit(message(root, 6))
    shared.submit(message(root, 7))
    outcomes = finish(shared, 2)
    assert sorted(outcome.message.adapter_id for outcome in outcomes) == [6, 7]
    for outcome in outcomes:
        assert outcome.adapter is not None
        outcome.adapter.close()
    assert shared.poll_seconds is None


def test_child_that_cannot_be_started_is_a_refusal(
    own: Callable[..., LoaderPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("subprocess.Popen", fail)
    assert "no loader process can be started" in refused(own(), message(Path("/x")))


def test_child_ends_with_its_parent(own: Callable[..., LoaderPool], tmp_path: Path) -> None:
    loaders = own()
    loads(loaders, adapter(tmp_path))
    child = loaders._workers[0].loader._child
    child._lifeline.close()
    child.wait(10)
    assert child.exit_text == "ended with status 0"
