"""`python -m engine.launch [MODEL]`: starts the three processes, restarts them on faults, stops them in order.

    launch          holds the listening socket and the run directory
      +- model_runner      weights, adapters, tensors
      +- scheduler         rows, pages, lanes
      +- tokenizer_proc    HTTP, text, names              (starts last, stops first)

SIGTERM, SIGINT and SIGHUP stop it in order, a second one at once. With --embedded the launcher is the child process of
an `engine.Engine`: it reads ServerArgs as JSON from stdin, reports Ready on stdout, and stops when its parent says so.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `-m` looks for packages in the working directory first. It may hold anything; it is needed last, for a checkout.
    sys.path.append(sys.path.pop(0))

import asyncio
import codecs
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
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
from engine.processes import signals
from engine.processes.banner import banner
from engine.processes.child import Child, Facts, leave
from engine.processes.incarnations import Addresses, Incarnations
from engine.processes.run_directory import run_directory
from engine.processes.supervisor import Supervisor

T = TypeVar("T")
log = logging.getLogger(__name__)

DEAD_GRACE_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0 after an orderly end, 1 if it could not serve, 2 for a bad flag.

    Without `argv` this process is the command: its signals and standard streams are taken over.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--embedded"]:
        return _embedded()
    started = time.monotonic()
    requests = signals.StopRequests()
    if argv is None:
        if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":  # no path or name could be more than that
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        logs.open_descriptors()
        logs.take_over()
        requests.listen()
    try:
        args = parse(arguments)
        _run(args, lambda facts: print(banner(facts, time.monotonic() - started), flush=True), requests)
    except EngineError as error:
        print(f"chorus: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except signals.Stopped:
        leave()  # a download may go on in a thread
    return 0


def _embedded() -> int:
    def request() -> None:
        signals.interrupt_main_thread(signal.SIGUSR1)

    requests = signals.StopRequests()
    requests.listen_for(signal.SIGUSR1)
    child = Child(on_stop=request, on_orphaned=request)
    child.begin_startup().idle()  # idle: a download may take long, and the three processes have their own limits
    try:
        _run(child.config(ServerArgs), child.ready, requests)
    except EngineError as error:
        child.failed(error)
        return 1
    except signals.Stopped:
        leave()
    return 0


def _run(args: ServerArgs, announce: Callable[[Facts], None], requests: signals.StopRequests) -> None:
    """Serves until a request to stop. Raises EngineError if the start fails, or if a process has died too often."""
    logs.setup("launch", args.log_level)
    with run_directory() as directory, _listening(args) as listener, _journal() as journal:
        addresses = Addresses(directory)
        with requests.interrupting():
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
            asyncio.run(_serve(incarnations, lambda runner: announce({**runner, **facts}), requests))


async def _serve(incarnations: Incarnations, announce: Callable[[Facts], None], requests: signals.StopRequests) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    supervisor = Supervisor(incarnations.spec_factories)

    def on_request() -> None:
        """Stops the processes in order on the first request, and kills them on the second."""
        if requests.count > 1:
            supervisor.kill()
        stop.set()

    with requests.calling(lambda: loop.call_soon_threadsafe(on_request)):
        async with supervisor:
            reports = await _run_until_stopped(stop, supervisor.ready())
            if reports is not None:
                incarnations.keep_sizes(reports["model_runner"].facts)
                announce(reports["model_runner"].facts)
                death = await _run_until_stopped(stop, supervisor.run_until_unrecoverable())
                if death is not None:
                    await supervisor.stop(DEAD_GRACE_SECONDS)  # without the process that died no request can finish
                    raise EngineDead(f"{death}; its log is above")
            log.info("stopping: open requests may finish first; once more ends them")


async def _run_until_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Runs `work` and returns its result, or cancels it and returns None if `stop` is set first."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return None if tasks[0].cancelled() else tasks[0].result()


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
