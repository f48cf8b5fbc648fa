"""Tokens to vectors and back: the embedding table and the head, which may be one tensor (tied). Both are sites.

Whole on every rank for now. Legend: T tokens, S rows that are asked for, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import embedding

from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.pool.full_weights import Lanes, close, replace_rows, vocabularies, widen
from model_runner.lora.site import EMBED, HEAD, Site, Slice
from model_runner.weights.packed import linear, pack


class Embedding:
    """A table [V, H], looked up by token."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.site = Site("embed", "model", -1, EMBED, (Slice("embed_tokens", 0, weight.shape[1]),), weight)
        self.lora: LoraBackend | None = None

    def __call__(self, tokens_T: torch.Tensor, lora: Any = None, lanes_T: Lanes | None = None) -> torch.Tensor:
        """[T] -> [T, H]; `lora` is what the backend planned for these tokens, `lanes_T` as in the batch."""
        if self.lora is None:
            return embedding(tokens_T, self.weight)
        if lanes_T is None:
            return self.lora.embed(tokens_T, self.site, lora)
        known_T = tokens_T.clamp(max=self.site.vocabulary - 1)  # a token beyond lies in its own lane's table
        y_TH = self.lora.embed(known_T, self.site, lora)
        replace_rows(y_TH, tokens_T, self.site, self.lora.pages, lanes_T, lambda table, x: embedding(x, table))
        return y_TH


class Head:
    """A linear [V, H] whose answers are float32 logits."""

    def __init__(self, weight: torch.Tensor, tied: bool = False) -> None:
        self.weight = weight
        self.site = Site("head", "", -1, HEAD, (Slice("lm_head", 0, weight.shape[0]),), weight, tied=tied)
        self.lora: LoraBackend | None = None

    def pack(self) -> None:
        """Its weight in the order in which a CPU reads it. A tied one stays: rows of it are looked up."""
        if not self.site.tied:
            self.weight = pack(self.weight)
            self.site = replace(self.site, weight=self.weight)

    def __call__(self, hidden_SH: torch.Tensor, lora: Any = None, lanes_S: Lanes | None = None) -> torch.Tensor:
        """[S, H] -> [S, V] float32; `lora` is what the backend planned for these rows, `lanes_S` their lanes.

        V is the largest vocabulary among these rows'; `close` says where each of them ends.
        """
        if self.lora is None:
            return linear(hidden_SH, self.weight).float()
        y_SV = self.lora.linear(hidden_SH, self.site, lora)
        if lanes_S is not None:
            y_SV = widen(y_SV, vocabularies(self.site, self.lora.pages, lanes_S))
            replace_rows(y_SV, hidden_SH, self.site, self.lora.pages, lanes_S, lambda head, x: linear(x, head))
        return y_SV.float()

    def close(self, logits_SV: torch.Tensor, lanes_S: Lanes) -> None:
        """Ends each row's logits where its vocabulary ends, in place."""
        if self.lora is not None:
            close(logits_SV, vocabularies(self.site, self.lora.pages, lanes_S))
