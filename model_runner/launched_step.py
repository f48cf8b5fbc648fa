"""A step that was launched on the device: its results are being copied to the host, and become a StepDone."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import LogprobIds, StepDone
from model_runner.compute.sampler.logprobs import Logprobs
from model_runner.compute.sampler.sampler import Sampled
from model_runner.platform.device import DeviceEvent


@dataclass(frozen=True)
class LaunchedStep:
    """A launched step. `sampled` and `scores` are on the host once the event `done` has occurred.

    sampling      the indices of the chunks that sample
    scores        log-probabilities of prompt tokens, in parts, by chunk index
    score_widths  the number of alternatives that are reported for each of these tokens, by chunk index
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
        """Returns the message for the scheduler, without `seconds`. The step must have ended."""
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
