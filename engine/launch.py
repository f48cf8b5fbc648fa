"""`python -m engine.launch [MODEL]`: starts the three processes, restarts them on faults, stops them in order.

    launch          holds the listening socket and the run directory
      +- model_runner      weights, adapters, tensors
      +- scheduler         rows, pages, lanes
      +- tokenizer_proc    HTTP, text, names              (starts last, stops first)

With --embedded the launcher is the child process of an `engine.Engine`: it reads ServerArgs as JSON from stdin and
reports Ready on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine import hub, logs
from engine.config.flags.parser import parse
from engine.config.lora_paths import AdapterSpec, adapter_specs
from engine.config.process_configs import AdapterSource, ProcessConfigs
from engine.config.resolve import resolve
from engine.config.server_args import DEMO, ServerArgs, served_names
from engine.errors import ConfigError, EngineDead, EngineError
from engine.journal.journal import Journal
from engine.journal.memory_file import MemoryFile
from engine.lora_roots import allowed_roots, check_files
from engine.processes.banner import banner
from engine.processes.child import Child, Facts
from engine.processes.incarnations import Addresses, Incarnations
from engine.processes.supervisor import Supervisor

T = TypeVar("T")
log = logging.getLogger(__name__)

DEAD_GRACE_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0 after an orderly end, 1 if it could not serve, 2 for a bad flag."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--embedded"]:
        return _embedded()
    started = time.monotonic()
    try:
        args = parse(arguments)
        _run(args, lambda facts: print(banner(facts, time.monotonic() - started), flush=True))
    except EngineError as error:
        print(f"chorus: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _embedded() -> int:
    child = Child(on_orphaned=lambda: os.kill(os.getpid(), signal.SIGTERM))
    child.begin_startup().idle()  # idle: a download may take long, and the three processes have their own limits
    try:
        _run(child.config(ServerArgs), child.ready)
    except EngineError as error:
        child.failed(error)
        return 1
    return 0


def _run(args: ServerArgs, announce: Callable[[Facts], None]) -> None:
    """Serves until a signal arrives. Raises EngineError if the start fails, or if a process has died too often."""
    logs.setup("launch", args.log_level)
    with _run_directory() as directory, _listening(args) as listener, _journal() as journal:
        addresses = Addresses(directory)
        resolved = _resolve(args, addresses, listener, journal)
        Journal.create(journal, resolved.tokenizer.adapters)
        facts: Facts = {
            "model": served_names(args)[0],
            "address": resolved.tokenizer.endpoints.zmq_server,
            "url": _url(args, listener),
        }
        facts["adapters"] = [adapter.name for adapter in resolved.tokenizer.adapters]
        incarnations = Incarnations(resolved, addresses, journal)
        with addresses.kept():
            asyncio.run(_serve(incarnations, lambda runner: announce({**runner, **facts})))


async def _serve(incarnations: Incarnations, announce: Callable[[Facts], None]) -> None:
    stop = asyncio.Event()
    async with Supervisor(incarnations.spec_factories) as supervisor:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop, supervisor)
        reports = await _run_until_stopped(stop, supervisor.ready())
        if reports is not None:
            announce(reports["model_runner"].facts)
            death = await _run_until_stopped(stop, supervisor.run_until_unrecoverable())
            if death is not None:
                await supervisor.stop(DEAD_GRACE_SECONDS)  # without the process that died no request can finish
                raise EngineDead(f"{death}; its log is above")
        log.info("stopping: open requests may finish first; once more ends them")


def _on_signal(stop: asyncio.Event, supervisor: Supervisor) -> None:
    """Handles SIGINT and SIGTERM: the first signal stops the processes in order, the second kills them."""
    if stop.is_set():
        supervisor.kill()
    stop.set()


async def _run_until_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Runs `work` and returns its result, or cancels it and returns None if `stop` is set first."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return None if tasks[0].cancelled() else tasks[0].result()


@contextlib.contextmanager
def _run_directory() -> Iterator[Path]:
    """Yields a new directory (mode 0700) for the sockets. Its path is short: a socket path has at most 107 bytes."""
    parent = tempfile.gettempdir()
    directory = Path(tempfile.mkdtemp(prefix="chorus-", dir=parent if len(parent) < 64 else "/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _journal() -> Iterator[list[MemoryFile]]:
    """Yields the two empty files of the journal of adapters. They stay open while the tokenizer process restarts."""
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(MemoryFile.created(f"adapters.{number}")) for number in range(2)]


@contextlib.contextmanager
def _listening(args: ServerArgs) -> Iterator[socket.socket | None]:
    """Yields the listening socket, or None without HTTP.

    The socket is bound before anything slow, so that a port in use fails at once. It stays open while the tokenizer
    process restarts.
    """
    if args.port is None:
        yield None
        return
    try:
        family = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"--host {args.host} --port {args.port}: cannot listen there ({why})") from error
    with listener:
        yield listener


def _url(args: ServerArgs, listener: socket.socket | None) -> str | None:
    if listener is None:
        return None
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _resolve(
    args: ServerArgs, addresses: Addresses, listener: socket.socket | None, journal: Sequence[MemoryFile]
) -> ProcessConfigs:
    """Downloads models and adapters where needed and derives the config of each process."""
    specs = adapter_specs(args)
    model = DEMO / "model" if args.model_path is None else hub.local_directory(args.model_path, "--model-path")
    tokenizer = (
        None if args.tokenizer_path is None else hub.tokenizer_directory(args.tokenizer_path, "--tokenizer-path")
    )
    return resolve(
        args,
        endpoints=addresses.endpoints(),
        model=model,
        tokenizer=tokenizer,
        adapters=[_source(number, spec, args) for number, spec in enumerate(specs, start=1)],
        listen_fd=listener.fileno() if listener else None,
        journal=[file.descriptor for file in journal],
    )


def _source(number: int, spec: AdapterSpec, args: ServerArgs) -> AdapterSource:
    base_names, what = served_names(args), f"--lora-paths {spec.name}"
    root = hub.local_directory(spec.path, what)
    roots = allowed_roots([*args.lora_root, str(DEMO)] if args.lora_root else [])
    check_files(root, roots, what)
    if spec.base is not None and spec.base not in base_names:
        log.warning("adapter %s names %s as its base model; it is served on %s", spec.name, spec.base, base_names[0])
    return AdapterSource(
        adapter_id=number,
        name=spec.name,
        path=spec.path,
        root=str(root),
        pinned=spec.pinned,
        base=spec.base,
        roots=roots,
    )


if __name__ == "__main__":
    sys.exit(main())
