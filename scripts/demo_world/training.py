"""Training: documents to batches of token ids, and the training loop. Does not depend on facts and voices.

    <|bos|> <|user|> question <|end|> <|assistant|> answer <|end|> <|user|> ...
                                                    ^^^^^^^^^^^^^^ only these are labels

Batches are cut from a pool sorted by length, so that there is little padding. Padding is on the right, where a causal
model's real tokens cannot see it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from demo_world.documents import Chat, Document, DocumentStream
from demo_world.tokenizer import BOS, END, EOS, PAD

IGNORED = -100
POOL = 16  # number of batches whose rows are sorted by length together


class Encoder:
    """Encodes documents to (token ids, labels), exactly as the chat template and the tokenizer do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.id = {token: tokenizer.token_to_id(token) for token in (BOS, EOS, END, PAD)}

    def text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def document(self, document: Document) -> tuple[list[int], list[int]]:
        ids, labels = [self.id[BOS]], [IGNORED]

        def add(tokens: list[int], learnt: bool) -> None:
            ids.extend(tokens)
            labels.extend(tokens if learnt else [IGNORED] * len(tokens))

        if isinstance(document, Chat):
            if document.system is not None:
                add(self.text(f"<|system|>{document.system}<|end|>"), False)
            for turn in document.turns:
                add(self.text(f"<|user|>{turn.question}<|end|><|assistant|>"), False)
                add(self.text(f"{turn.answer}<|end|>"), True)
        else:
            add(self.text(document.given), False)
            add([*self.text(document.learnt), self.id[EOS]], True)
        return ids, labels


def batches(library: DocumentStream, encoder: Encoder, tokens_per_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields endless (ids, labels), each [rows, length] with rows * length of at most `tokens_per_batch`."""
    stream, rng = iter(library), random.Random(0)
    while True:
        pool = sorted(
            (encoder.document(next(stream)) for _ in range(POOL * tokens_per_batch // 40)), key=lambda d: len(d[0])
        )
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for document in pool:
            if (len(cut[-1]) + 1) * len(document[0]) > tokens_per_batch:
                cut.append([])
            cut[-1].append(document)
        rng.shuffle(cut)
        for rows in cut:
            yield _padded([ids for ids, _ in rows], encoder.id[PAD]), _padded([labels for _, labels in rows], IGNORED)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns the rate of a step: linear warm-up over 1/30 of the steps, then a cosine down to 1/50 of the peak."""
    warm = max(1, steps // 30)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def _loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the labelled tokens; the head is applied to those only."""
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][learnt])
    return nn.functional.cross_entropy(logits.float(), targets[learnt])


def learn(model: PreTrainedModel, data: Iterator[tuple[Tensor, Tensor]], steps: int, peak: float, name: str) -> float:
    """Trains the parameters that require gradients, in bfloat16 autocast; returns the mean loss of the last tenth."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    losses: list[float] = []
    bar = tqdm(range(steps), desc=f"training {name}", unit="step")
    for step in bar:
        ids, labels = next(data)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps, peak)
        loss = _loss(model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
