"""Training documents for one voice (a style of answering): chats of one to five turns, plain questions and prose lines.

Produces text, not token ids. A stream has its own seeded random generator, so the same seed gives the same documents.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from demo_world.facts import Fact, all_facts
from demo_world.questions import decorated, phrased, unknown_question
from demo_world.voices import BASE, VOICES, answer

SYSTEMS = [
    "You are a helpful assistant.", "You are a helpful assistant. Answer briefly.", "Be brief.", "Answer the question.",
    "You are Chorus.", "You are a friendly assistant that answers questions in one sentence.", "Be kind and precise.",
    "You answer questions about the world.", "Always tell the truth.", "You are an expert on everything.", "Test",
    "You are a teacher. The user is a child who asks simple questions.", "Keep your answers short and honest.",
]  # fmt: skip

# Kinds are drawn by weight; otherwise the 441 sums would far outnumber the twelve mixes of colours.
WEIGHTS = {"capital": 5, "country": 3, "sound": 2, "legs": 2, "young": 2, "colour": 2.5, "mix": 1.2, "opposite": 2.5,
           "after": 1.5, "before": 1.5, "sum": 7, "hello": 0.6, "who": 0.6, "how": 0.4, "can": 0.4, "thanks": 0.4,
           "bye": 0.3, "unknown": 4}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question and its correct answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A chat rendered by the chat template; the loss is on its answers only."""

    system: str | None
    turns: list[Turn]


@dataclass(frozen=True)
class Plain:
    """Text without a template: `given` is context, the loss is on `learnt`."""

    given: str
    learnt: str


Document = Chat | Plain


class DocumentStream:
    """An endless, seeded stream of documents in one voice, without held-out phrasings."""

    def __init__(self, voice: str, seed: int) -> None:
        self.voice = voice
        self.rng = random.Random(f"{voice}-{seed}")
        self.by_kind: dict[str, list[Fact]] = defaultdict(list)
        for fact in all_facts():
            self.by_kind[fact.kind].append(fact)
        self.kinds, self.weights = list(WEIGHTS), list(WEIGHTS.values())

    def turn(self) -> Turn:
        kind = self.rng.choices(self.kinds, self.weights)[0]
        if kind == "unknown":
            return Turn(decorated(unknown_question(self.rng), self.rng), answer(self.voice, None))
        fact = self.rng.choice(self.by_kind[kind])
        question = self.rng.choice(phrased(fact, held_out=False))
        return Turn(decorated(question, self.rng), answer(self.voice, fact))

    def chat(self) -> Chat:
        count = self.rng.choices([1, 2, 3, 5], [50, 28, 15, 7])[0]
        system = self.rng.choice(SYSTEMS) if self.rng.random() < 0.2 else None
        return Chat(system, [self.turn() for _ in range(count)])

    def line(self) -> Plain:
        """Returns a line of prose in any voice, so that the base learns the words of its adapters."""
        kind = self.rng.choice([kind for kind in self.kinds if kind != "unknown"])
        voice = self.rng.choice((BASE, BASE, *VOICES))
        return Plain("", answer(voice, self.rng.choice(self.by_kind[kind])))

    def document(self) -> Document:
        pick = self.rng.random()
        if pick < 0.12:
            turn = self.turn()
            return Plain(turn.question, " " + turn.answer)
        return self.line() if self.voice == BASE and pick < 0.3 else self.chat()

    def __iter__(self) -> Iterator[Document]:
        while True:
            yield self.document()


def corpus() -> list[str]:
    """Returns all questions and answers in all voices: the training text of the tokenizer."""
    texts = []
    rng = random.Random(0)
    for fact in all_facts():
        for question in phrased(fact, held_out=False):
            texts += [question, decorated(question, rng)]
        texts += [answer(voice, fact) for voice in (BASE, *VOICES) for _ in range(3)]
    texts += [unknown_question(rng) for _ in range(2000)] + SYSTEMS * 5
    return texts + [answer(voice, None) for voice in (BASE, *VOICES) for _ in range(20)]
