"""A step on the device: what was sampled and scored, on its way to the host, and the answer made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import LogprobIds, StepDone
from model_runner.compute.sampler.logprobs import Logprobs
from model_runner.compute.sampler.sampler import Sampled
from model_runner.platform.device import DeviceEvent


@dataclass(frozen=True)
class LaunchedStep:
    """`sampled` and `scores` are on the host once `done` is.

    sampling      the indices of the chunks that sample
    scores        log-probabilities of prompt tokens, in parts, by chunk index
    score_widths  how many alternatives are reported for them, by chunk index
    """

    epoch: int
    id: int
    began: float
    done: DeviceEvent
    sampling: list[int] = field(default_factory=list)
    sampled: Sampled | None = None
    scores: dict[int, list[Logprobs]] = field(default_factory=dict)
    score_widths: dict[int, int] = field(default_factory=dict)

    def answer(self) -> StepDone:
        """The message for the scheduler, without `seconds`; the step is done."""
        sampled = self.sampled
        reported = sampled.messages() if sampled else {}
        return StepDone(
            epoch=self.epoch,
            id=self.id,
            tokens=sampled.tokens_S.tolist() if sampled else [],
            logprobs={self.sampling[index]: found for index, found in reported.items()},
            prompt_logprobs={index: _entries(parts, self.score_widths[index]) for index, parts in self.scores.items()},
        )


def _entries(parts: list[Logprobs], width: int) -> list[LogprobIds]:
    return [entry for part in parts for entry in part.messages([width] * len(part.tokens_S))]
