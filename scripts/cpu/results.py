"""Results of several runs in one JSON file, and medians and ratios over all of them.

A ratio compares two measurements of the same round and session; the median ratio is reported. Measures nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OURS = "chorus"


@dataclass(frozen=True)
class Entry:
    """One load on one server in one round. `session` identifies a run of the script; times in milliseconds, if any."""

    session: int
    round: int
    shape: str
    server: str
    load: str
    concurrency: int
    tokens_per_s: float
    floor: float
    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def comparison_key(self) -> tuple[object, ...]:
        """A key that is equal for entries that may be compared."""
        return self.session, self.round, self.shape, self.concurrency


@dataclass(frozen=True)
class Idle:
    """The p50 of the time to first token on an idle server, and of the time of the linears for the same prompt."""

    session: int
    shape: str
    server: str
    ttft_ms: float
    linears_ms: float


@dataclass
class Results:
    """All measurements so far."""

    entries: list[Entry]
    idle: list[Idle]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads the results from a file; they are empty if there is no file."""
        if not path.exists():
            return cls([], [])
        held = json.loads(path.read_text(encoding="utf-8"))
        return cls([Entry(**entry) for entry in held["entries"]], [Idle(**idle) for idle in held["idle"]])

    def write(self, path: Path) -> None:
        """Replaces the file with these results."""
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {"entries": [asdict(entry) for entry in self.entries], "idle": [asdict(idle) for idle in self.idle]}
        path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")

    def servers(self) -> list[str]:
        """Returns the names of the servers: ours first, then the others in the order in which they were measured."""
        found = dict.fromkeys(entry.server for entry in self.entries)
        return sorted(found, key=lambda name: name != OURS)

    def of(self, shape: str, server: str, load: str, concurrency: int) -> list[Entry]:
        """Returns the entries of one line of the table: all its rounds."""
        wanted = shape, server, load, concurrency
        return [e for e in self.entries if (e.shape, e.server, e.load, e.concurrency) == wanted]

    def ratio(self, entries: Sequence[Entry], server: str, load: str) -> float | None:
        """Returns the median throughput relative to that of `server` under `load` in the same rounds, if any."""
        rates = {e.comparison_key: e.tokens_per_s for e in self.entries if (e.server, e.load) == (server, load)}
        found = [e.tokens_per_s / rates[e.comparison_key] for e in entries if rates.get(e.comparison_key)]
        return statistics.median(found) if found else None

    def rate(self, shape: str, server: str, load: str, concurrency: int) -> float | None:
        """Returns the output tokens per second: the median of the rounds; None without rounds."""
        found = [e.tokens_per_s for e in self.of(shape, server, load, concurrency)]
        return statistics.median(found) if found else None


HEAD = (
    "load".ljust(18) + "conc".rjust(5) + "rounds".rjust(8) + "tokens/s".rjust(10) + "of base".rjust(9)
    + "floor".rjust(7) + "over it".rjust(9) + "of ours".rjust(9) + "TTFT ms".rjust(9) + "ITL ms".rjust(8)
)  # fmt: skip


def table(results: Results, titles: dict[str, str]) -> str:
    """Returns the results as text. `over it`: the throughput that the bytes allow over the measured throughput."""
    lines = []
    for shape in dict.fromkeys(entry.shape for entry in results.entries):
        for server in results.servers():
            rows = _rows(results, titles, shape, server)
            lines += [f"\n{shape}, {server}", HEAD, *rows] if rows else []
    for idle in results.idle:
        share = f"{idle.ttft_ms / idle.linears_ms:.2f} of the linears' own {idle.linears_ms:.1f} ms"
        lines.append(f"{idle.shape}, {idle.server}, idle: TTFT p50 {idle.ttft_ms:.1f} ms, {share}")
    return "\n".join(lines)


def _rows(results: Results, titles: dict[str, str], shape: str, server: str) -> list[str]:
    rows = []
    for load, title in titles.items():
        for concurrency in sorted({entry.concurrency for entry in results.entries}):
            entries = results.of(shape, server, load, concurrency)
            if entries:
                rows.append(f"{title:18}{concurrency:5}{len(entries):8}" + _figures(results, entries))
    return rows


def _figures(results: Results, entries: Sequence[Entry]) -> str:
    first = entries[0]
    of_base = results.ratio(entries, first.server, "base")
    bytes_allow = statistics.median(entry.floor for entry in entries)
    rate = statistics.median(entry.tokens_per_s for entry in entries)
    over = bytes_allow / of_base if of_base else None
    ratios = "".join(_cell(value, width, 2) for value, width in ((of_base, 9), (bytes_allow, 7), (over, 9)))
    times = _cell(_median([e.ttft_ms for e in entries]), 9, 0) + _cell(_median([e.itl_ms for e in entries]), 8, 1)
    return f"{rate:10.1f}{ratios}{_of_ours(results, entries):>9}{times}"


def _of_ours(results: Results, entries: Sequence[Entry]) -> str:
    """Returns a peer's throughput relative to ours, with `~` if they were never measured in the same round."""
    first = entries[0]
    if first.server == OURS:
        return "-"
    beside = results.ratio(entries, OURS, first.load)
    if beside is not None:
        return f"{beside:.2f}"
    rate, ours = (results.rate(first.shape, name, first.load, first.concurrency) for name in (first.server, OURS))
    return f"~{rate / ours:.2f}" if rate and ours else "-"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _cell(value: float | None, width: int, digits: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"
