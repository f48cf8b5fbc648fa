"""The parameter `bad_words`: sequences of tokens that the output must not contain.

A word's last token cannot be sampled while the output ends with the word's other tokens:

    word 7 8 9     output ... 7 8    9 is masked

The end of each row's output is kept on the device, because the host does not know the latest tokens yet when it
launches a step. Where the bad words would leave no token at all, none is masked. Legend: S rows that sample, B of them
with bad words, W bad words of all these rows, L tokens before the last one of a word, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from engine.messages import NewRow
from model_runner.compute.sampler.logits_processors.base import LogitsProcessor
from model_runner.compute.sampler.parameters import Ints
from model_runner.platform.device import upload

ANY = -1
"""Stands before the first token of a word in its line of `before_WL`: every token fits there."""
NONE = -2
"""Stands before the first token of an output: it fits nowhere but at ANY."""


class _Words(NamedTuple):
    """The words of one row: their last tokens [W], and the tokens before [W, L], aligned to the right."""

    last_W: torch.Tensor
    before_WL: torch.Tensor


class BadWords(LogitsProcessor):
    """Keeps, for each row with bad words, the words and the last tokens of its output [L], on the device."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._has_words = np.zeros(rows, np.bool_)
        self._words: dict[int, _Words] = {}
        self._output_ends_L: dict[int, torch.Tensor] = {}
        self._applied: tuple[list[int], torch.Tensor] | None = None

    def begin(self, new: NewRow) -> None:
        words = [word for word in new.sampling.bad_words if word and 0 <= word[-1] < self._vocab_size]
        if not words:
            return
        longest = max(map(len, words)) - 1
        before = [[ANY] * (longest + 1 - len(word)) + word[:-1] for word in words]
        output = [NONE] * longest + new.history[new.prompt_length :]
        self._has_words[new.row] = True
        self._words[new.row] = _Words(
            upload(np.array([word[-1] for word in words], np.int64), self._device),
            upload(np.array(before, np.int64).reshape(len(words), longest), self._device),
        )
        self._output_ends_L[new.row] = upload(np.array(output[len(output) - longest :], np.int64), self._device)

    def end(self, row: int) -> None:
        self._words.pop(row, None)
        self._output_ends_L.pop(row, None)
        self._has_words[row] = False

    def reset(self) -> None:
        self._words.clear()
        self._output_ends_L.clear()
        self._has_words.fill(False)

    def is_active(self, rows: Ints, positions: Ints) -> bool:
        return bool(self._words) and bool(self._has_words[rows].any())

    def apply(self, logits_SV: torch.Tensor, rows: Ints, positions: Ints) -> None:
        chosen = np.flatnonzero(self._has_words[rows])
        index_B = upload(chosen, self._device)
        before_BV = logits_SV[index_B]
        after_BV = before_BV.clone()
        numbers = [int(row) for row in rows[chosen]]
        for place, row in enumerate(numbers):
            self._mask(after_BV[place], row)
        is_empty_B1 = torch.isneginf(after_BV).all(-1, keepdim=True)
        logits_SV[index_B] = torch.where(is_empty_B1, before_BV, after_BV)
        self._applied = numbers, index_B

    def _mask(self, logits_V: torch.Tensor, row: int) -> None:
        """Masks the last tokens of the row's words that the output has reached. Several words may have the same one."""
        words = self._words[row]
        fits_W = ((words.before_WL == self._output_ends_L[row]) | (words.before_WL == ANY)).all(-1)
        fits_W &= words.last_W < logits_V.shape[0]
        added_W = torch.where(fits_W, float("-inf"), 0.0).to(logits_V.dtype)
        logits_V.index_add_(0, words.last_W.clamp(max=logits_V.shape[0] - 1), added_W)

    def accept(self, tokens_S: torch.Tensor, rows: Ints) -> None:
        assert self._applied is not None, "accept follows apply"
        numbers, index_B = self._applied
        tokens_B = tokens_S[index_B]
        for place, row in enumerate(numbers):
            end_L = self._output_ends_L[row]
            self._output_ends_L[row] = torch.cat([end_L, tokens_B[place : place + 1]])[1:] if len(end_L) else end_L
