"""Paths of adapters that are loaded at run time: directories, hub ids, roots; read in threads that may hang."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import threading
from pathlib import Path

import pytest
from fixtures.serving.loading_front import adapter_dir

from engine.errors import AdapterError, EngineError, NotFound, Overloaded, StorageFailed, TimedOut
from engine.lora_roots import allowed_roots
from tokenizer_proc.adapters import sources as sources_module
from tokenizer_proc.adapters.sources import Sources


def find(path: str, *roots: str) -> str:
    async def work() -> str:
        return await asyncio.wait_for(Sources(allowed_roots(roots)).find("sql", path), 10)

    return asyncio.run(work())


def test_a_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = adapter_dir(tmp_path / "x" / "sql")
    assert find(str(directory)) == str(directory)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("x/sql", "./x/sql", "~/x/sql", "x/../x/sql/"):
        assert find(path) == str(directory)
        assert find(path, str(tmp_path / "x")) == str(directory)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("/no/such/place", NotFound, "No adapter found for /no/such/place"),
        ("nonsense", NotFound, "neither a directory nor a hub id"),
        ("org/none", NotFound, "fetching it from the hub failed"),
        ("org/none@v1", NotFound, "fetching it from the hub failed"),
        ("a\0b", AdapterError, "no path"),
        ("x" * 5000, AdapterError, "no path"),
        ("/" + "x" * 4000, EngineError, "sql"),
        ("~nobody-at-all/x", EngineError, "home"),
    ],
)
def test_a_path_without_an_adapter_says_why(
    path: str, kind: type[EngineError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(kind, match=message) as refusal:
        find(path)
    assert refusal.value.status in (400, 404)
    assert refusal.value.param == "lora_path"


def test_files_and_empty_directories_are_no_adapters(tmp_path: Path) -> None:
    directory = adapter_dir(tmp_path / "sql")
    with pytest.raises(AdapterError, match="is a file"):
        find(str(directory / "adapter_config.json"))
    with pytest.raises(NotFound, match="there is no adapter_config"):
        find(str(tmp_path))
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="no regular file"):
        find(str(directory))


def test_directories_outside_of_the_roots_stay_hidden(tmp_path: Path) -> None:
    """The error for a path outside of the roots does not reveal whether the path exists."""
    root = tmp_path / "root"
    adapter_dir(root / "sql")
    adapter_dir(tmp_path / "there")
    told = []
    for path in (tmp_path / "there", tmp_path / "not-there", tmp_path / "there" / "adapter_config.json"):
        with pytest.raises(AdapterError, match="lies outside of --lora-root") as refusal:
            find(str(path), str(root))
        told.append(refusal.value.message.replace(str(path), "PATH"))
    assert len(set(told)) == 1
    assert find(str(root / "sql"), str(root)) == str(root / "sql")


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--sql" / "snapshots" / "c0ffee"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(adapter_dir(snapshot)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find("org/sql@c0ffee", "/some/root") == str(snapshot)


def test_few_run_at_once_and_a_caller_may_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, running, most = threading.Event(), [], [0]

    directory = adapter_dir(tmp_path / "sql")

    def slow(path: str, what: str) -> Path:
        running.append(what)
        most[0] = max(most[0], len(running))
        assert go.wait(10)
        running.remove(what)
        return directory

    monkeypatch.setattr(sources_module.hub, "local_directory", slow)

    async def work() -> None:
        sources = Sources()
        tasks = [asyncio.ensure_future(sources.find(str(number), str(directory))) for number in range(9)]
        while len(running) < sources_module.AT_ONCE:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        go.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[1:] == [str(directory)] * 8
        assert most[0] <= sources_module.AT_ONCE  # the cancelled caller's work goes on in its thread, which counts

    asyncio.run(work())


def test_hanging_downloads_do_not_block_local_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def hangs(*_: object, **__: object) -> str:
        go.wait(10)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hangs)
    directory = str(adapter_dir(tmp_path / "sql"))

    async def work() -> None:
        sources = Sources()
        downloads = [asyncio.ensure_future(sources.find("x", f"org/name{number}")) for number in range(9)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(sources.find("sql", directory), 5) == directory
        go.set()
        done = await asyncio.gather(*downloads, return_exceptions=True)
        assert all(isinstance(each, NotFound) for each in done)

    asyncio.run(work())


def test_downloads_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that leave end neither the downloads, which cannot be stopped, nor the bound on their number."""
    go, begun = threading.Event(), list[str]()

    def hangs(repo: str, **_: object) -> str:
        begun.append(repo)
        go.wait(10)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hangs)
    monkeypatch.setattr(sources_module, "MOST_WAITING", 3)

    async def work() -> None:
        sources = Sources()

        async def ask(count: int) -> list[asyncio.Task[str]]:
            tasks = [asyncio.ensure_future(sources.find("x", f"org/name{number}")) for number in range(count)]
            await asyncio.sleep(0.1)
            return tasks

        for task in await ask(sources_module.AT_ONCE):
            task.cancel()
        waiting = await ask(5)
        refused = [task for task in waiting if task.done()]
        assert len(refused) == 2
        with pytest.raises(Overloaded, match="3 adapters wait for their download"):
            refused[0].result()
        assert len(begun) == sources_module.AT_ONCE
        go.set()
        assert len(await asyncio.gather(*waiting, return_exceptions=True)) == 5
        assert len(begun) == sources_module.AT_ONCE + 3

    asyncio.run(work())


def test_a_download_that_never_ends_is_a_504(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: go.wait(10))
    monkeypatch.setattr(sources_module, "DOWNLOAD_SECONDS", 0.05)
    with pytest.raises(TimedOut, match=r"adapter `sql`: org/sql was not downloaded within .*`hf download`"):
        find("org/sql")
    go.set()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_disk_under_the_hub_cache_is_a_503(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(code, os.strerror(code), str(tmp_path / "blob"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StorageFailed, match=f"org/sql cannot be kept under {tmp_path}.*free space there") as failure:
        find("org/sql")
    assert failure.value.status == 503


def test_a_panic_of_a_library_reaches_the_caller() -> None:
    class Panic(BaseException):
        pass

    def work() -> None:
        raise Panic

    async def scenario() -> None:
        sources = Sources()
        for _ in range(2 * sources_module.AT_ONCE):
            with pytest.raises(Panic):
                await asyncio.wait_for(sources.read(work), 20)

    asyncio.run(scenario())


def test_threads_that_do_not_start_keep_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        sources = Sources()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            for _ in range(sources_module.AT_ONCE):
                with pytest.raises(Overloaded, match="threads"):
                    await sources.read(lambda: 1)
        assert await asyncio.wait_for(sources.read(lambda: 1), 20) == 1

    asyncio.run(scenario())


def test_no_file_descriptors_left_is_a_503(tmp_path: Path) -> None:
    """The limit on descriptors is the server's, so the directory is not to blame."""
    directory = adapter_dir(tmp_path / "sql")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def work() -> None:
        sources = Sources()
        await sources.find("sql", str(directory))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StorageFailed, match=r"the server cannot read .*Too many open files"):
                await sources.find("sql", str(directory))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    asyncio.run(work())
