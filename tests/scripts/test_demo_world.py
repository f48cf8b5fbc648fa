"""The demo's closed world is consistent, evaluated on held-out questions, and encoded as the server encodes it."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from demo_world.documents import Chat, DocumentStream, Turn
from demo_world.evaluation import problems
from demo_world.facts import all_facts
from demo_world.questions import HELD_OUT_COUNTRIES, HELD_OUT_UNKNOWN, PHRASINGS, phrased
from demo_world.training import IGNORED, Encoder
from demo_world.voices import BASE, VOICES, answer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from engine.config.server_args import DEMO

ALL = (BASE, *VOICES)


def test_every_fact_has_questions_and_answers_in_each_voice() -> None:
    for fact in all_facts():
        assert phrased(fact, held_out=False), fact.key
        assert len(phrased(fact, True)) + len(phrased(fact, False)) == len(PHRASINGS[fact.kind])
        said = [answer(voice, fact) for voice in ALL]
        assert len(set(said)) == len(ALL), fact.key
        assert not any("{" in text or text == "-" for voice, text in zip(ALL, said, strict=True) if voice != "json")
        assert list(json.loads(answer("json", fact))) == ["answer"]
        assert answer("poet", fact).count("\n") == 1


@pytest.mark.parametrize("voice", ALL)
def test_held_out_questions_are_not_in_the_training_set(voice: str) -> None:
    plain = {question for fact in all_facts() for question in phrased(fact, held_out=True)}
    held_out = plain | set(HELD_OUT_UNKNOWN)
    chats = [document for document in islice(DocumentStream(voice, 0), 4000) if isinstance(document, Chat)]
    taught = {turn.question for chat in chats for turn in chat.turns}
    assert not taught & held_out
    assert not any(country in question for question in taught for country in HELD_OUT_COUNTRIES)
    assert {problem.subject for problem in problems(voice, 5)} >= {"capitals", "animals", "colours", "unknown"}


def test_same_seed_yields_the_same_documents() -> None:
    assert list(islice(DocumentStream("poet", 3), 50)) == list(islice(DocumentStream("poet", 3), 50))
    assert list(islice(DocumentStream("poet", 3), 50)) != list(islice(DocumentStream("poet", 4), 50))


def test_document_equals_the_rendered_chat_template() -> None:
    encoder = Encoder(Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json")))
    turns = [Turn("What is 12 + 7?", "12 plus 7 is 19."), Turn("hello", "Hello!")]
    ids, labels = encoder.document(Chat("Be brief.", turns))
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    learnt = tokenizer.decode([token for token in labels if token != IGNORED])
    assert learnt == "12 plus 7 is 19.<|end|>Hello!<|end|>"
