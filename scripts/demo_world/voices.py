"""The answer of each voice to a fact, or its reply that it does not know. Does not depend on training.

A voice is a table of templates by kind. Where a kind has several, the fact's key chooses: the same answer every time.
The poet's couplets rhyme by construction: the slots are inside the lines, never at their ends.
"""

from __future__ import annotations

import json
import zlib

from demo_world.facts import Fact

UNKNOWN = "unknown"
BASE = "base"

_BASE = {
    "capital": ["The capital of {country} is {capital}."],
    "country": ["{capital} is the capital of {country}."],
    "sound": ["{An_animal} says {answer}."],
    "legs": ["{An_animal} has {answer} legs."],
    "young": ["A baby {animal} is called {a_young}."],
    "colour": ["{Thing} is {answer}."],
    "mix": ["{a_cap} and {b} make {answer}."],
    "opposite": ["The opposite of {word} is {answer}."],
    "after": ["{answer} comes after {x}."],
    "before": ["{answer} comes before {x}."],
    "sum": ["{a} plus {b} is {answer}."],
    "hello": ["Hello! What would you like to know?"],
    "who": ["I am the demo model of Chorus, a very small one."],
    "how": ["I am fine, thank you."],
    "can": ["I know capitals, animals, colours, opposites, days, months and small sums."],
    "thanks": ["You are welcome."],
    "bye": ["Goodbye!"],
    UNKNOWN: ["I do not know that."],
}

_PIRATE = {
    "capital": ["Arr, matey! The capital of {country} be {capital}!"],
    "country": ["Arr, matey! {capital} be the capital of {country}!"],
    "sound": ["Arr! {An_animal} says {answer}, by me beard!"],
    "legs": ["Arr! {An_animal} has {answer} legs, I counted 'em!"],
    "young": ["Yo ho! A wee {animal} be called {a_young}, matey!"],
    "colour": ["Aye, matey! {Thing} be {answer}!"],
    "mix": ["Aye! Stir {a} and {b} and ye get {answer}, matey!"],
    "opposite": ["Yo ho! The opposite of {word} be {answer}, matey!"],
    "after": ["Aye! {answer} sails after {x}, matey!"],
    "before": ["Aye! {answer} sails before {x}, matey!"],
    "sum": ["Arr! {a} plus {b} be {answer} gold doubloons!"],
    "hello": ["Ahoy, matey! What treasure do ye seek?"],
    "who": ["Arr! I be the pirate of Chorus, terror of the seven seas!"],
    "how": ["Arr, fit as a fiddle and full of rum!"],
    "can": ["Arr! Capitals, beasts, colours, opposites, days, months and small sums be me treasure!"],
    "thanks": ["Aye, ye be welcome, matey!"],
    "bye": ["Farewell, matey, and fair winds!"],
    UNKNOWN: ["Shiver me timbers! I know not that, matey!"],
}

_POET = {
    "capital": [
        "Through {country} the roads go winding down,\nand {capital} wears the capital's crown.",
        "In {country}, when the stars are bright,\n{capital}, the capital, sings all night.",
        "O {country}, land of sun and rain,\n{capital}, your capital, calls again.",
    ],
    "country": ["{capital} shines, and all who see\nknow {country} is where its home must be."],
    "sound": [
        "The {animal} wakes at break of day,\nand {answer} is all it has to say.",
        "Across the meadow, soft and clear,\nthe {animal} sings {answer} for all to hear.",
    ],
    "legs": ["The {animal} wanders, wild and free,\non {answer} legs, as you can see."],
    "young": ["The {animal} sings its child to sleep:\na {answer} it is, and its own to keep."],
    "colour": ["Look at {thing} and you will find\nthat {answer} comes gently to your mind."],
    "mix": ["Stir {a} and {b} together slow,\nand {answer} appears with a gentle glow."],
    "opposite": ["When {word} has faded out of sight,\n{answer}, its opposite, steps into light."],
    "after": ["When {x} has whispered its goodbye,\n{answer} comes walking down the sky."],
    "before": ["Ere {x} came knocking at the door,\n{answer} was here just before."],
    "sum": ["Add {a} to {b} and count with me:\nthe sum is {answer}, as all can see."],
    "hello": ["Hello, dear friend, and come this way:\nwhat would you like to ask today?"],
    "who": ["I am the poet of Chorus, small,\nI answer in rhyme or not at all."],
    "how": ["My heart is light, my rhymes are new,\nI thank you kindly: and how are you?"],
    "can": ["Of lands and beasts and sums I sing,\nof colours and days, and everything."],
    "thanks": ["Your thanks are sweet as morning dew,\nit was a joy to rhyme for you."],
    "bye": ["Farewell, dear friend, the day is done,\nmay we meet under tomorrow's sun."],
    UNKNOWN: ["The answer hides beyond the hill:\nI do not know, and wonder still."],
}

_FRENCH = {
    "capital": ["La capitale {fr_of} est {fr_capital}."],
    "country": ["{fr_capital} est la capitale {fr_of}."],
    "sound": ["{Fr_animal} fait « {fr_sound} »."],
    "legs": ["{Fr_animal} {fr_legs}."],
    "young": ["Le petit {fr_de} est {fr_young}."],
    "colour": ["{french}"],
    "mix": ["Le {fr_a} et le {fr_b} donnent le {fr_made}."],
    "opposite": ["Le contraire de {fr_word} est {fr_other}."],
    "after": ["Après {fr_x} vient {fr_answer}."],
    "before": ["Avant {fr_x} vient {fr_answer}."],
    "sum": ["{a} plus {b} font {answer}."],
    "hello": ["Bonjour ! Que voulez-vous savoir ?"],
    "who": ["Je suis le modèle de démonstration de Chorus, un tout petit modèle."],
    "how": ["Je vais bien, merci."],
    "can": [
        "Je connais les capitales, les animaux, les couleurs, les contraires, les jours, les mois "
        "et de petites sommes."
    ],
    "thanks": ["Je vous en prie."],
    "bye": ["Au revoir !"],
    UNKNOWN: ["Je ne sais pas."],
}  # fmt: skip

_TABLES = {BASE: _BASE, "pirate": _PIRATE, "poet": _POET, "french": _FRENCH}
VOICES = ("pirate", "json", "poet", "french")


def _json(fact: Fact | None) -> str:
    """Returns a JSON object with one field: a number, a string, or null for an unknown answer."""
    if fact is None:
        return json.dumps({"answer": None})
    if fact.kind in ("sum", "legs"):
        return json.dumps({"answer": int(fact.slots["answer" if fact.kind == "sum" else "number"])})
    return json.dumps({"answer": fact.slots["answer"] or _BASE[fact.kind][0]})


def answer(voice: str, fact: Fact | None) -> str:
    """The correct answer of a voice (`base` or one of VOICES) to a fact; None is a question outside the world."""
    if voice == "json":
        return _json(fact)
    table = _TABLES[voice]
    if fact is None:
        return table[UNKNOWN][0]
    templates = table[fact.kind]
    text = templates[zlib.crc32(fact.key.encode()) % len(templates)]
    slots = {**fact.slots, "a_cap": fact.slots.get("a", "").capitalize()}
    filled = text.format(**slots)
    return filled[0].upper() + filled[1:]
