"""What an attack has found: the kinds with their answers, the victim's gaps, memory, and the promises that broke."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from attacks.rounds import Round
from attacks.victim import Watch

MOST_GAP = 3.0
MOST_MEMORY = 1.3


@dataclass
class KindResult:
    """The rounds of one kind."""

    rounds: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    worst_gap: float = 0.0
    memory: int = 0
    longest: float = 0.0
    broken: Counter[str] = field(default_factory=Counter)
    skipped: str = ""


@dataclass
class Phase:
    """A part of the run: `calm`, `attack`, or `faults`.

    `samples` are (time, bytes) of the whole engine's memory, `health` is the longest answer of /health in seconds.
    """

    name: str
    watch: Watch = field(default_factory=Watch)
    samples: list[tuple[float, int]] = field(default_factory=list)
    health: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    restarts: int = 0

    @property
    def with_faults(self) -> bool:
        """Whether processes were killed, so that streams may pause."""
        return self.name == "faults"

    @property
    def memory(self) -> int:
        """The most memory in bytes."""
        return max((size for _, size in self.samples), default=0)

    def kinds(self) -> dict[str, KindResult]:
        """Returns the results by kind. A gap or a sample of memory counts for every kind that had a round then."""
        found: dict[str, KindResult] = {}
        for one in self.rounds:
            result = found.setdefault(one.kind, KindResult())
            ended = one.began if one.ended is None else one.ended
            result.rounds += 1
            result.statuses.update(one.statuses)
            result.longest = max(result.longest, ended - one.began)
            result.skipped = one.skipped or result.skipped
            if one.broken:
                result.broken[one.broken] += 1
            for end, gap in self.watch.gaps:
                if gap > result.worst_gap and end >= one.began and end - gap <= ended:
                    result.worst_gap = gap
            in_round = [size for at, size in self.samples if one.began <= at <= ended]
            result.memory = max([result.memory, *in_round])
        return dict(sorted(found.items()))

    def broken(self, calm: Phase) -> list[str]:
        """Returns the promises that broke in this phase, one a line."""
        found = [(name, what, n) for name, result in self.kinds().items() for what, n in result.broken.items()]
        found += [("the victim", what, n) for what, n in Counter(self.watch.differences).most_common()]
        lines = [f"{name}: {what}" + (f" ({count} times)" if count > 1 else "") for name, what, count in found]
        if not self.watch.answered:
            lines.append("the victim: no stream was finished")
        if (ratio := share(self.memory, calm.memory)) > MOST_MEMORY:
            lines.append(f"memory: {ratio:.2f} of the calm, at most {MOST_MEMORY}")
        if not self.with_faults and (ratio := self.gap_ratio(calm)) > MOST_GAP:
            lines.append(f"gaps: p99 {ratio:.2f} of the calm, at most {MOST_GAP}")
        if not self.with_faults and self.restarts:
            lines.append(f"{self.restarts} processes were replaced")
        return [f"{self.name}: {line}" for line in lines]

    def gap_ratio(self, calm: Phase) -> float:
        """Returns p99 of the gaps over that of the calm."""
        return share(self.watch.percentile(0.99), calm.watch.percentile(0.99))

    def figures(self, calm: Phase) -> dict[str, Any]:
        """Returns the figures for the JSON file."""
        watch = self.watch
        return {
            "streams": {"answered": watch.answered, "refused": watch.refused, "cut": watch.cut},
            "gaps": {"count": len(watch.gaps), "p50": watch.percentile(0.5), "p99": watch.percentile(0.99),
                     "worst": watch.worst(), "ratio": self.gap_ratio(calm)},
            "first_token_p99": watch.first_token(),
            "memory": {"most": self.memory, "ratio": share(self.memory, calm.memory)},
            "health": self.health,
            "restarts": self.restarts,
            "kinds": {
                name: {"rounds": result.rounds, "answers": dict(result.statuses),
                       "worst_gap": result.worst_gap, "memory": result.memory,
                       "longest_round": result.longest, "skipped": result.skipped, "broken": dict(result.broken)}
                for name, result in self.kinds().items()
            },
        }  # fmt: skip

    def show(self, calm: Phase) -> list[str]:
        """Returns the lines of a table by kind, and one of the victim's figures."""
        watch = self.watch
        lines = [
            f"{self.name:7} {watch.answered} streams, {watch.refused} refused, {watch.cut} cut; gaps p50 "
            f"{watch.percentile(0.5) * 1000:.0f} p99 {watch.percentile(0.99) * 1000:.0f} worst "
            f"{watch.worst() * 1000:.0f} ms, p99 {self.gap_ratio(calm):.2f} of the calm; first token p99 "
            f"{watch.first_token() * 1000:.0f} ms; {self.memory >> 20} MiB, {share(self.memory, calm.memory):.2f} of "
            f"the calm; /health at most {self.health:.2f} s; {self.restarts} restarts"
        ]
        if self.rounds:
            lines.append(
                f"  {'kind':32}{'rounds':>7}{'longest':>10}{'worst gap':>11}{'memory':>10}  {'verdict':8} answers"
            )
        for name, result in self.kinds().items():
            verdict = "BROKEN" if result.broken else "skipped" if result.skipped else "held"
            answers = "  ".join(f"{status} {count}" for status, count in sorted(result.statuses.items()))
            gap = f"{result.worst_gap * 1000:.0f} ms"
            lines.append(f"  {name:32}{result.rounds:>7}{result.longest:>8.1f} s{gap:>11}{result.memory >> 20:>6} MiB  "
                         f"{verdict:8} {answers or result.skipped}")  # fmt: skip
        return lines


@dataclass
class Report:
    """One run: the phases, the first of which is the calm, and what else broke."""

    phases: list[Phase]
    others: list[str] = field(default_factory=list)

    def broken(self) -> list[str]:
        """Returns the promises that broke, one a line; none when all held."""
        return [line for phase in self.phases for line in phase.broken(self.phases[0])] + self.others

    def json(self) -> dict[str, Any]:
        """Returns the figures."""
        calm = self.phases[0]
        return {"phases": {phase.name: phase.figures(calm) for phase in self.phases}, "broken": self.broken()}

    def show(self) -> str:
        """Returns a table by phase and kind, and the broken promises."""
        lines = [line for phase in self.phases for line in phase.show(self.phases[0])]
        broken = self.broken()
        return "\n".join([*lines, f"{len(broken)} promises broke", *(f"  {line[:600]}" for line in broken[:80])])


def share(value: float, whole: float) -> float:
    """Returns the quotient, or 0 without a whole."""
    return value / whole if whole else 0.0
