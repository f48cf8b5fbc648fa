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
    longest: float = 0.0
    broken: Counter[str] = field(default_factory=Counter)
    skipped: str = ""


@dataclass
class Report:
    """One run. Sizes are in bytes, times in seconds."""

    faults: bool
    calm: Watch
    attacked: Watch = field(default_factory=Watch)
    calm_memory: int = 0
    attacked_memory: int = 0
    calm_health: float = 0.0
    attacked_health: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    restarts: int = 0
    tracebacks: int = 0
    exit_status: int | None = 0
    others: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, KindResult]:
        """Returns the results by kind. A gap counts for every kind that had a round during it."""
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
            for end, gap in self.attacked.gaps:
                if gap > result.worst_gap and end >= one.began and end - gap <= ended:
                    result.worst_gap = gap
        return found

    @property
    def gap_ratio(self) -> float:
        """The p99 of the gaps during the attack over that of the calm."""
        calm = self.calm.percentile(0.99)
        return self.attacked.percentile(0.99) / calm if calm else 0.0

    @property
    def memory_ratio(self) -> float:
        """The most memory during the attack over the most in the calm."""
        return self.attacked_memory / self.calm_memory if self.calm_memory else 0.0

    def broken(self) -> list[str]:
        """Returns the promises that broke, one a line; none when all held."""
        lines = [f"{name}: {what} ({count} times)" for name, result in sorted(self.kinds().items())
                 for what, count in result.broken.items()]  # fmt: skip
        differences = Counter(self.calm.differences + self.attacked.differences)
        lines += [f"the victim: {what} ({count} times)" for what, count in differences.most_common()]
        if not self.attacked.answered:
            lines.append("the victim: no stream was finished")
        if self.memory_ratio > MOST_MEMORY:
            lines.append(f"memory: {self.memory_ratio:.2f} of the calm, at most {MOST_MEMORY}")
        if not self.faults and self.gap_ratio > MOST_GAP:
            lines.append(f"gaps: p99 {self.gap_ratio:.2f} of the calm, at most {MOST_GAP}")
        if not self.faults and self.restarts:
            lines.append(f"{self.restarts} processes were replaced")
        if self.tracebacks:
            lines.append(f"the log holds {self.tracebacks} tracebacks")
        if self.exit_status:
            lines.append(f"the launch ended with status {self.exit_status}")
        return lines + self.others

    def json(self) -> dict[str, Any]:
        """Returns the figures."""
        return {
            "kinds": {
                name: {"rounds": result.rounds, "answers": dict(result.statuses), "worst_gap": result.worst_gap,
                       "longest_round": result.longest, "skipped": result.skipped, "broken": dict(result.broken)}
                for name, result in sorted(self.kinds().items())
            },
            "victim": {name: phase(watch) for name, watch in (("calm", self.calm), ("attacked", self.attacked))},
            "gap_ratio": self.gap_ratio,
            "memory": {"calm": self.calm_memory, "attacked": self.attacked_memory, "ratio": self.memory_ratio},
            "health": {"calm": self.calm_health, "attacked": self.attacked_health},
            "restarts": self.restarts,
            "exit_status": self.exit_status,
            "broken": self.broken(),
        }  # fmt: skip

    def show(self) -> str:
        """Returns a table by kind, the figures of the victim, and the broken promises."""
        lines = [f"{'kind':32}{'rounds':>7}{'worst gap':>11}  {'verdict':8} answers"]
        for name, result in sorted(self.kinds().items()):
            verdict = "BROKEN" if result.broken else "skipped" if result.skipped else "held"
            answers = "  ".join(f"{status} {count}" for status, count in sorted(result.statuses.items()))
            lines.append(f"{name:32}{result.rounds:>7}{result.worst_gap * 1000:>8.0f} ms  {verdict:8} "
                         f"{answers or result.skipped}")  # fmt: skip
        lines.append("")
        for name, watch in (("calm", self.calm), ("attacked", self.attacked)):
            lines.append(
                f"{name:9} {watch.answered} streams, {watch.refused} refused, {watch.cut} cut; gaps p50 "
                f"{watch.percentile(0.5) * 1000:.0f} p99 {watch.percentile(0.99) * 1000:.0f} worst "
                f"{watch.worst() * 1000:.0f} ms; first token p99 {first(watch) * 1000:.0f} ms"
            )
        lines.append(f"gap p99 {self.gap_ratio:.2f} of the calm; memory {self.memory_ratio:.2f} "
                     f"({self.calm_memory >> 20} -> {self.attacked_memory >> 20} MiB); /health at most "
                     f"{self.calm_health:.2f} -> {self.attacked_health:.2f} s; {self.restarts} restarts")  # fmt: skip
        broken = self.broken()
        lines += [f"{len(broken)} promises broke", *(f"  {line[:600]}" for line in broken[:60])]
        return "\n".join(lines)


def first(watch: Watch) -> float:
    """Returns the p99 of the seconds to the first token."""
    ordered = sorted(watch.first)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0


def phase(watch: Watch) -> dict[str, Any]:
    """Returns the figures of one phase of the victim."""
    gaps = {
        "p50": watch.percentile(0.5),
        "p99": watch.percentile(0.99),
        "worst": watch.worst(),
        "count": len(watch.gaps),
    }
    return {"answered": watch.answered, "refused": watch.refused, "cut": watch.cut, "gaps": gaps,
            "first_token_p99": first(watch), "differences": watch.differences}  # fmt: skip
