"""The server under attack: the demo with keys of five kinds, in a directory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.launched_server import LaunchedServer

from attacks.kinds import rates, rights
from attacks.target import Config

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo"
VOICES = ("pirate", "json", "poet", "french")
KEYS = {
    "victim": {"tenant": "victim"},
    "attacker": {"tenant": "attacker"},
    "restricted": {"tenant": "restricted", "adapters": ["public-*"], "base": False},
    "limited": {"tenant": "limited", "requests_per_minute": rates.REQUESTS_PER_MINUTE,
                "tokens_per_minute": rates.TOKENS_PER_MINUTE},
}  # fmt: skip
KV_TOKENS = 32_768
SMALL_DISK = "6m"


class AttackedServer:
    """A launched server, and what the attackers are told of it."""

    def __init__(self, launched: LaunchedServer, config: Config, victim_key: str) -> None:
        self.launched, self.config, self.victim_key = launched, config, victim_key

    @property
    def pid(self) -> int:
        """The process id of the launcher."""
        return self.launched.process.pid


def write_keys(path: Path) -> dict[str, str]:
    """Writes the file of keys, and returns the keys by name."""
    keys = {name: f"key-of-{name}" for name in KEYS}
    lines = [json.dumps({"key": keys[name], **rules}) for name, rules in KEYS.items()]
    path.write_text("\n".join(lines) + "\n")
    return keys | {"wrong": "no-such-key", "admin": "key-of-the-operator"}


@contextlib.contextmanager
def small_disk(directory: Path, wanted: bool) -> Iterator[Path]:
    """Mounts a file system of a few megabytes, if that is wanted and possible, and yields where."""
    directory.mkdir()
    mounted = (
        wanted
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(directory)],
            check=False,
            capture_output=True,
        ).returncode
    )
    try:
        yield directory
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=False)


@contextlib.contextmanager
def attacked_server(faults: bool, *flags: str) -> Iterator[AttackedServer]:
    """Starts a server with keys, six adapters, and 32 requests in a step of which each tenant has its share."""
    with (
        tempfile.TemporaryDirectory(prefix="attack-") as work,
        small_disk(Path(work) / "run", faults) as run_directory,
    ):
        scratch = Path(work) / "adapters"
        scratch.mkdir()
        keys = write_keys(Path(work) / "keys")
        paths = {voice: DEMO / "adapters" / voice for voice in VOICES}
        paths |= {"public-1": paths["pirate"], rights.HIDDEN: paths["french"]}
        given = [
            "--model-path", DEMO / "model", "--served-model-name", "chorus-demo", "--dtype", "float32",
            "--cpu-threads", 1, "--api-key-file", Path(work) / "keys", "--admin-api-key", keys["admin"],
            "--lora-root", scratch, DEMO / "adapters", "--max-running-requests", 32, "--schedule-policy", "fair",
            "--max-stream-buffer", "256KiB", "--max-request-memory", "64MiB", "--max-total-tokens", KV_TOKENS, *flags,
            "--lora-paths", *(f"{n}={path}" for n, path in paths.items()),
        ]  # fmt: skip
        before = os.environ.get("TMPDIR")
        os.environ |= {"TMPDIR": str(run_directory), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        try:
            launched = LaunchedServer(*given)
            launched.__enter__()
        finally:
            os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
        try:
            yield AttackedServer(launched, _config(launched, scratch, keys, faults), keys["victim"])
        finally:
            launched.__exit__(None, None, None)


def _config(launched: LaunchedServer, scratch: Path, keys: dict[str, str], faults: bool) -> Config:
    """Reads the rest of the announcement, which ends with the address for embedded clients."""
    assert launched.process.stdout is not None
    for line in launched.process.stdout:
        if found := re.search(r'Engine\.connect\("(\S+)"\)', line):
            break
    else:
        raise RuntimeError("the server has not announced its address")
    host, _, port = launched.url.removeprefix("http://").partition(":")
    return Config(
        host=host, port=int(port), pid=launched.process.pid, zmq_address=found.group(1), scratch=str(scratch),
        demo=str(DEMO), keys={name: key for name, key in keys.items() if name != "victim"}, faults=faults,
    )  # fmt: skip
