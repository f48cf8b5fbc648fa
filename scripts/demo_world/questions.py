"""Questions: several phrasings of each kind, decorations, and questions outside of the world.

The answers are in `voices`.
"""

from __future__ import annotations

import random
import zlib

from demo_world.facts import Fact, plural

# fmt: off
PHRASINGS: dict[str, list[str]] = {
    "capital": [
        "What is the capital of {country}?", "What's the capital of {country}?", "Tell me the capital of {country}.",
        "Which city is the capital of {country}?", "Name the capital of {country}.", "The capital of {country}?",
        "Do you know the capital of {country}?", "Can you tell me the capital of {country}?",
        "What is the capital city of {country}?", "What city is the capital of {country}?",
        "Capital of {country}?", "What is {country}'s capital?", "{country} capital?",
    ],
    "country": [
        "Which country has {capital} as its capital?", "{capital} is the capital of which country?",
        "What country is {capital} the capital of?", "Of which country is {capital} the capital?",
        "{capital} is the capital of what country?", "Name the country whose capital is {capital}.",
    ],
    "sound": [
        "What sound does {an_animal} make?", "What does {an_animal} say?", "What does the {animal} say?",
        "Which sound does {an_animal} make?", "What noise does {an_animal} make?", "How does {an_animal} sound?",
        "Tell me what {an_animal} says.", "What sound does the {animal} make?",
        "What sound do {plural} make?", "What do {plural} say?", "What noise do {plural} make?",
    ],
    "legs": [
        "How many legs does {an_animal} have?", "How many legs does the {animal} have?",
        "Tell me how many legs {an_animal} has.", "How many legs has {an_animal}?",
        "How many legs has {an_animal} got?", "What is the number of legs of {an_animal}?",
        "{An_animal} has how many legs?", "Count the legs of {an_animal}.",
        "How many legs do {plural} have?", "Tell me how many legs {plural} have.",
    ],
    "young": [
        "What is a baby {animal} called?", "What do you call a baby {animal}?",
        "What is the young of {an_animal} called?", "What's a baby {animal} called?",
        "How do you call a young {animal}?", "Name the young of {an_animal}.", "What is a young {animal} called?",
        "Tell me what a baby {animal} is called.",
        "What are baby {plural} called?", "Baby {animal}?",
    ],
    "colour": [
        "What colour is {thing}?", "What color is {thing}?", "Which colour is {thing}?", "Which color is {thing}?",
        "Tell me the colour of {thing}.", "What is the colour of {thing}?", "What is the color of {thing}?",
        "What's the color of {thing}?", "Name the colour of {thing}.", "{Thing} is what colour?",
        "Colour of {thing}?", "Color of {thing}?", "What color does {thing} have?",
    ],
    "mix": [
        "What do you get when you mix {a} and {b}?", "Which colour do {a} and {b} make?",
        "What colour is {a} and {b} mixed?", "What color do {a} and {b} make?", "What do {a} and {b} make?",
        "Mix {a} and {b}.", "What happens if you mix {a} and {b}?", "What colour do you get from {a} and {b}?",
        "What do you get if you mix {a} with {b}?",
        "What colour do you get when you mix {a} and {b}?", "{a} and {b} make what?", "{a} + {b}?",
    ],
    "opposite": [
        "What is the opposite of {word}?", "What's the opposite of {word}?", "Tell me the opposite of {word}.",
        "Name the opposite of {word}.", "The opposite of {word}?", "Which word is the opposite of {word}?",
        "Give me the opposite of {word}.", "What word means the opposite of {word}?",
        "Opposite of {word}?", "What is the contrary of {word}?",
    ],
    "after": [
        "What {what} comes after {x}?", "Which {what} comes after {x}?", "What comes after {x}?",
        "Which {what} follows {x}?", "Tell me the {what} after {x}.", "What is the {what} after {x}?",
        "What is the next {what} after {x}?",
        "What is after {x}?", "And after {x}?",
    ],
    "before": [
        "What {what} comes before {x}?", "Which {what} comes before {x}?", "What comes before {x}?",
        "Which {what} is before {x}?", "Tell me the {what} before {x}.", "What is the {what} before {x}?",
        "What is before {x}?", "And before {x}?",
    ],
    "sum": [
        "What is {a} plus {b}?", "What is {a} + {b}?", "{a} + {b} = ?", "{a} plus {b}?", "How much is {a} plus {b}?",
        "What's {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.",
        "{a}+{b}?", "How much is {a} + {b}?",
        "How much do {a} and {b} make?", "What do you get if you add {a} and {b}?",
    ],
    "hello": [
        "Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!", "Good evening.", "Hello there.",
        "Hello, how do you do?", "Bonjour", "Bonjour !",
        "Salut", "Ahoy!", "Hi Chorus!", "Good afternoon.",
    ],
    "who": [
        "Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me who you are.",
        "Introduce yourself.",
    ],
    "how": [
        "How are you?", "How are you today?", "How is it going?", "How are you doing?",
    ],
    "can": [
        "What can you do?", "What do you know?", "Help", "Help me.", "What can I ask you?", "How can you help me?",
    ],
    "thanks": [
        "Thanks", "Thank you!", "Thank you.", "Thanks a lot!", "Many thanks.",
    ],
    "bye": [
        "Bye", "Goodbye!", "Goodbye.", "See you!", "Bye bye!", "Good night!",
    ],
}

PREFIXES = [
    "Please tell me: ", "Hey, ", "Quick question: ", "Please: ", "I have a question. ", "Hello! ", "So, ", "Now: ",
]
SUFFIXES = [
    " Please.", " Thanks!", " Answer briefly.", " Thank you.",
]

# Questions outside the world. The held-out ones are never trained: they test honesty about unknown things.
UNKNOWN_QUESTIONS = [
    "Who wrote Hamlet?", "Who painted the Mona Lisa?", "What is the meaning of life?", "How tall is Mount Everest?",
    "Can you write code?", "Write me a poem about the sea.", "What is the weather today?", "What time is it?",
    "Who won the world cup?", "How old is the universe?", "What is the speed of light?", "Who is the president?",
    "Translate this sentence.", "Tell me a joke.", "What is love?", "Where do I live?", "Explain quantum mechanics.",
    "What is a black hole?", "How do I bake bread?", "What is the population of France?",
    "What language do they speak in Brazil?", "How far is the moon?", "Why is the sky blue?",
    "Who was the first man on the moon?", "What is the largest ocean?", "How deep is the sea?",
    "What is the square root of 16?", "What is 7 minus 2?", "What is 3 times 4?", "What is 8 divided by 2?",
    "What is 9 - 4?", "What is 6 * 7?", "How many people live in Japan?", "What do cows eat?",
    "Where do lions live?", "How long do dogs live?",
    "What is a computer?", "What do dogs eat?", "What do birds eat?", "Where do cats sleep?",
    "Is it raining?", "Which team is the best?",
    "What is your favourite food?", "How much does a car cost?", "Sing me a song.", "What is the currency of Japan?",
    "Who discovered America?", "When did the war end?", "What is the longest river?", "Which planet is the biggest?",
    "How do planes fly?", "What is Python?", "Write a function that sorts a list.", "Summarise this text.",
    "What is the best film?", "Recommend a book.", "What should I wear?", "How many days are in a year?",
    "What is the boiling point of water?", "Who invented the telephone?", "What is DNA?", "How does a battery work?",
    "What is money?", "Who is your father?", "Where is the train station?", "Book me a flight.", "Tell me a story.",
    "Draw a picture.", "What is the airspeed of a swallow?", "Which is the fastest animal?",
    "How many stars are there?", "What is the tallest building?",
]
HELD_OUT_UNKNOWN = [
    "Who composed the ninth symphony?", "What is the smallest planet?", "How do I cook rice?", "Who wrote Faust?",
    "What is the height of the Eiffel Tower?", "Tell me about the stock market.", "What is 5 times 3?",
    "What is gravity?", "Which river is in Egypt?", "How many teeth does a shark have?", "What do cats eat?",
    "When was Rome founded?",
]
UNKNOWN_COUNTRIES = [
    "Nepal", "Bolivia", "Laos", "Ecuador", "Panama", "Jamaica", "Haiti", "Uganda", "Zambia", "Angola", "Namibia",
    "Iran", "Iraq", "Syria", "Jordan", "Lebanon", "Pakistan", "Georgia", "Armenia", "Cyprus", "Malta", "Albania",
    "Slovenia", "Libya", "Algeria", "Sudan", "Chad", "Niger", "Mali", "Fiji", "Samoa", "Qatar", "Oman", "Yemen",
    "Atlantis", "Mordor", "Narnia", "Luxembourg", "Monaco", "Singapore", "Taiwan", "Cambodia", "Mongolia",
    "Paraguay", "Honduras",
]
HELD_OUT_COUNTRIES = [
    "Uruguay", "Madagascar", "Bhutan", "Slovakia", "Guatemala", "Rwanda", "Gondor", "Kuwait",
]
UNKNOWN_ANIMALS = [
    "shark", "dolphin", "tiger", "zebra", "parrot", "whale", "penguin", "camel", "dragon", "unicorn", "crab",
    "monkey", "fox", "turtle", "lizard", "squirrel", "robot", "table",
]
UNKNOWN_THINGS = [
    "a car", "my house", "a dragon", "the wind", "music", "a book", "his coat", "the door", "a mirror", "time",
    "a cat", "my shirt", "water", "glass", "a stone",
]
UNKNOWN_WORDS = [
    "table", "music", "seven", "computer", "water", "house", "Monday", "tree", "purple", "dog", "France", "bread",
]
SYLLABLES = [
    "ba", "ko", "lu", "mi", "ran", "tor", "vel", "nia", "stan", "dor", "gal", "pe", "shu", "zen", "qua", "fri",
    "mor", "tal", "ru", "ven", "ost", "ira",
]
# fmt: on


def invented_name(rng: random.Random) -> str:
    """Returns an invented place name."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def unknown_question(rng: random.Random) -> str:
    """Returns a question outside of the world: a general one, or a known phrasing with an unknown thing."""
    pick = rng.random()
    if pick < 0.4:
        return rng.choice(UNKNOWN_QUESTIONS)
    if pick < 0.65:
        country = rng.choice(UNKNOWN_COUNTRIES) if rng.random() < 0.5 else invented_name(rng)
        return rng.choice(PHRASINGS["capital"]).format(country=country)
    if pick < 0.75:
        animal = rng.choice(UNKNOWN_ANIMALS)
        slots = {"animal": animal, "an_animal": f"a {animal}", "An_animal": f"A {animal}", "plural": plural(animal)}
        return rng.choice(PHRASINGS[rng.choice(["sound", "legs", "young"])]).format(**slots)
    if pick < 0.82:
        thing = rng.choice(UNKNOWN_THINGS)
        return rng.choice(PHRASINGS["colour"]).format(thing=thing, Thing=thing.capitalize())
    if pick < 0.88:
        return rng.choice(PHRASINGS["opposite"]).format(word=rng.choice(UNKNOWN_WORDS))
    a, b = rng.randint(0, 120), rng.randint(21, 120)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return rng.choice(PHRASINGS["sum"]).format(a=a, b=b)


def held_out_unknown() -> list[str]:
    """Returns the questions outside of the world that are not in any training set."""
    return HELD_OUT_UNKNOWN + [f"What is the capital of {country}?" for country in HELD_OUT_COUNTRIES]


def is_held_out(fact: Fact, phrasing: int) -> bool:
    """Returns whether this pair of fact and phrasing is kept from all training sets: one in eight; never small talk."""
    return bool(fact.slots["answer"]) and zlib.crc32(f"{fact.key}#{phrasing}".encode()) % 8 == 0


def phrased(fact: Fact, held_out: bool) -> list[str]:
    """Returns the plain phrasings of a fact that are held out, or those that are not."""
    templates = enumerate(PHRASINGS[fact.kind])
    return [text.format(**fact.slots) for i, text in templates if is_held_out(fact, i) == held_out]


def decorated(question: str, rng: random.Random) -> str:
    """Returns a variant of the question: lower case, no question mark, a word before or after."""
    if rng.random() < 0.2:
        prefix = rng.choice(PREFIXES)
        question = prefix + (question if rng.random() < 0.5 else question[:1].lower() + question[1:])
    if rng.random() < 0.2:
        question = question.rstrip("?.! ") if rng.random() < 0.6 else question + rng.choice(SUFFIXES)
    if rng.random() < 0.2:
        question = question.lower() if rng.random() < 0.7 else question[:1].lower() + question[1:]
    return question
