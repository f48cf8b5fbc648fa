"""Evaluation: greedy answers to held-out phrasings, which count as correct only if every character is correct."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from demo_world.documents import Chat, Turn
from demo_world.facts import Fact, all_facts
from demo_world.questions import decorated, held_out_unknown, phrased
from demo_world.training import Encoder
from demo_world.voices import answer

SUBJECTS = {"capitals": ("capital", "country"), "animals": ("sound", "legs", "young"), "colours": ("colour", "mix"),
            "opposites": ("opposite",), "calendar": ("after", "before"), "sums": ("sum",)}  # fmt: skip
MAX_NEW_TOKENS = 64
ROWS = 128


@dataclass(frozen=True)
class Problem:
    """One question of the evaluation, and the chat before it."""

    subject: str
    before: list[Turn]
    turn: Turn


def _asked(voice: str, fact: Fact, rng: random.Random) -> list[Turn]:
    questions = phrased(fact, held_out=True)
    return [Turn(decorated(question, rng), answer(voice, fact)) for question in questions]


def problems(voice: str, limit: int) -> list[Problem]:
    """Returns at most `limit` held-out questions per subject, then questions outside the world and second turns."""
    rng = random.Random(7)
    pools: dict[str, list[Turn]] = defaultdict(list)
    subject_of = {kind: subject for subject, kinds in SUBJECTS.items() for kind in kinds}
    for fact in all_facts():
        if fact.kind in subject_of:
            pools[subject_of[fact.kind]] += _asked(voice, fact, rng)
    known = {subject: rng.sample(pool, min(limit, len(pool))) for subject, pool in pools.items()}
    exam = [Problem(subject, [], turn) for subject, turns in known.items() for turn in turns]
    exam += [Problem("unknown", [], Turn(question, answer(voice, None))) for question in held_out_unknown()]
    turns = [turn for some in known.values() for turn in some]
    exam += [Problem("second turn", [rng.choice(turns)], turn) for turn in rng.sample(turns, min(limit, len(turns)))]
    return exam


@torch.inference_mode()
def replies(model: nn.Module, encoder: Encoder, prompts: list[list[int]]) -> list[str]:
    """Returns the greedy replies. Prompts of equal length form a batch, so that nothing is padded."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    texts = [""] * len(prompts)
    for members in by_length.values():
        for start in range(0, len(members), ROWS):
            rows = members[start : start + ROWS]
            for i, ids in zip(rows, _greedy(model, torch.tensor([prompts[i] for i in rows]), encoder), strict=True):
                texts[i] = encoder.tokenizer.decode(ids)
    return texts


def _greedy(model: nn.Module, ids: torch.Tensor, encoder: Encoder) -> list[list[int]]:
    end = torch.tensor([encoder.id["<|end|>"], encoder.id["<|eos|>"]])
    cache, fresh, out = None, ids, []
    done = torch.zeros(len(ids), dtype=torch.bool)
    while len(out) < MAX_NEW_TOKENS and not done.all():
        result = model(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        fresh = result.logits[:, -1].argmax(-1, keepdim=True)
        done |= torch.isin(fresh[:, 0], end)
        out.append(fresh.masked_fill(done[:, None], encoder.id["<|pad|>"]))
    return [[int(t) for t in row if t != encoder.id["<|pad|>"]] for row in torch.cat(out, dim=1)]


def evaluate(model: nn.Module, encoder: Encoder, voice: str, limit: int = 60) -> tuple[dict[str, float], list[str]]:
    """Returns the share of exact answers per subject, and a line for each wrong answer."""
    exam = problems(voice, limit)
    prompts = []
    for problem in exam:
        ids, _ = encoder.document(Chat(None, problem.before))
        prompts.append(ids + encoder.text(f"<|user|>{problem.turn.question}<|end|><|assistant|>"))
    marks: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for problem, reply in zip(exam, replies(model, encoder, prompts), strict=True):
        marks[problem.subject].append(reply == problem.turn.answer)
        if reply != problem.turn.answer:
            wrong.append(
                f"{voice}/{problem.subject}: {problem.turn.question!r} -> {reply!r}, not {problem.turn.answer!r}"
            )
    return {subject: sum(right) / len(right) for subject, right in marks.items()}, wrong
