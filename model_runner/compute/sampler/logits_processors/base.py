"""The interface of a logits processor, which the sampler calls for each step. Legend: S rows that sample, V vocabulary.

begin(new)                                    end(row) was called before if the row held another request
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
        """A new request holds the row `new.row`; its parameters are in `new.sampling`."""

    @abstractmethod
    def end(self, row: int) -> None:
        """Forgets the row's request, if it knows one."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets all rows."""

    @abstractmethod
    def is_active(self, rows: Ints, positions: Ints) -> bool:
        """Whether any of these rows uses it now; if not, `apply` and `accept` are not called for this step.

        Called in every step: host arrays only, and at once False while no request uses this processor.
        """

    @abstractmethod
    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        """Changes the float32 logits in place. V may be smaller than the `vocab_size` that it was created with."""

    def accept(self, tokens_S: torch.Tensor, rows: Ints) -> None:  # noqa: B027  (most have no state to update)
        """The sampled tokens, on the device, of the rows of the last `apply`."""
