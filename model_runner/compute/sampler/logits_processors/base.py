"""The interface of a logits processor, which the sampler calls for each step. Legend: S rows that sample, V vocabulary.

begin(new)                                    the sampler has called end(new.row) before
is_active(rows, positions) -> apply(logits) -> accept(tokens)                  in each step with an active row
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from engine.messages import NewRow
from model_runner.compute.sampler.parameters import Ints


class LogitsProcessor(ABC):
    """Keeps what it needs of each row's request, and changes the logits of the rows that use it.

    No method may wait for the device. `rows` are numbers of the runner's rows, each at most once; `positions` are the
    positions of the tokens that are about to be sampled.
    """

    @abstractmethod
    def begin(self, new: NewRow) -> None:
        """Stores what it needs of the request that now holds row `new.row`; its parameters are in `new.sampling`."""

    @abstractmethod
    def end(self, row: int) -> None:
        """Forgets the request of the row, if there is one."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets all rows."""

    @abstractmethod
    def is_active(self, rows: Ints, positions: Ints) -> bool:
        """Whether any of these rows uses the processor in this step; if not, `apply` and `accept` are not called.

        Called in every step, so it must read only host arrays, and return False at once if no request uses the
        processor.
        """

    @abstractmethod
    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        """Changes the float32 logits in place. V may be smaller than the `vocab_size` given to the constructor."""

    def accept(self, tokens_S: torch.Tensor, rows: Ints) -> None:  # noqa: B027  (most have no state to update)
        """Updates the processor's state with the tokens, on the device, that were sampled after the last `apply`."""
