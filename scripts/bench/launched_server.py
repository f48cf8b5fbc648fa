"""Launches a server of this project for a measurement."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class LaunchedServer:
    """Runs `python -m engine.launch` with the given flags on a free loopback port while the context is entered."""

    def __init__(self, *flags: object) -> None:
        self._flags = [str(flag) for flag in flags]

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "engine.launch", "--port", "0", "--log-level", "warning", *self._flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"ready at (http://\S+)", line)
        if match is None:
            self.process.wait()
            self._log.seek(0)
            raise RuntimeError(f"the server did not start:\n{self._log.read()[-2000:]}")
        self.url = match.group(1)
        return self

    def log(self) -> str:
        """Returns all text that the processes have written to stderr so far."""
        with open(f"/proc/self/fd/{self._log.fileno()}") as log:  # a separate file offset: the processes go on writing
            return log.read()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def info(self) -> dict[str, Any]:
        """Returns the JSON of GET /server_info."""
        with urllib.request.urlopen(self.url + "/server_info", timeout=60) as response:
            info: dict[str, Any] = json.load(response)
        return info

    def metric(self, name: str) -> float:
        """Returns the sum of a Prometheus series over its labels, or 0 if /metrics does not list the series."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}(\{{|\s)", line))

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> Any:
        """Sends a POST with a JSON body and returns the JSON of the response. Raises HTTPError on an error status."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)


def scratch() -> Path:
    """Returns the directory where generated models are kept between runs. git ignores it."""
    return Path(__file__).resolve().parents[2] / ".scratch"
