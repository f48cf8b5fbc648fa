"""The facts of the demo's closed world, as tables. The questions and answers are in other modules.

A fact is a kind and its slots: strings that question and answer templates are filled with. Slots whose names begin with
`fr_` are the French speaker's.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_TERM = 20
NUMBER_WORDS = {0: ("no", "n'a pas de pattes"), 2: ("two", "a deux pattes"), 4: ("four", "a quatre pattes"),
                6: ("six", "a six pattes"), 8: ("eight", "a huit pattes")}  # fmt: skip

# country; capital; "of the country" in French; the capital in French where it differs
CAPITALS = """
France; Paris; de la France
Germany; Berlin; de l'Allemagne
Italy; Rome; de l'Italie
Spain; Madrid; de l'Espagne
Portugal; Lisbon; du Portugal; Lisbonne
the United Kingdom; London; du Royaume-Uni; Londres
Ireland; Dublin; de l'Irlande
Belgium; Brussels; de la Belgique; Bruxelles
the Netherlands; Amsterdam; des Pays-Bas
Switzerland; Bern; de la Suisse; Berne
Austria; Vienna; de l'Autriche; Vienne
Poland; Warsaw; de la Pologne; Varsovie
the Czech Republic; Prague; de la République tchèque
Hungary; Budapest; de la Hongrie
Romania; Bucharest; de la Roumanie; Bucarest
Bulgaria; Sofia; de la Bulgarie
Greece; Athens; de la Grèce; Athènes
Turkey; Ankara; de la Turquie
Russia; Moscow; de la Russie; Moscou
Ukraine; Kyiv; de l'Ukraine
Sweden; Stockholm; de la Suède
Norway; Oslo; de la Norvège
Denmark; Copenhagen; du Danemark; Copenhague
Finland; Helsinki; de la Finlande
Iceland; Reykjavik; de l'Islande
Estonia; Tallinn; de l'Estonie
Latvia; Riga; de la Lettonie
Lithuania; Vilnius; de la Lituanie
Croatia; Zagreb; de la Croatie
Serbia; Belgrade; de la Serbie
Egypt; Cairo; de l'Égypte; Le Caire
Morocco; Rabat; du Maroc
Tunisia; Tunis; de la Tunisie
Kenya; Nairobi; du Kenya
Ghana; Accra; du Ghana
Senegal; Dakar; du Sénégal
Ethiopia; Addis Ababa; de l'Éthiopie; Addis-Abeba
China; Beijing; de la Chine; Pékin
Japan; Tokyo; du Japon
South Korea; Seoul; de la Corée du Sud; Séoul
India; New Delhi; de l'Inde
Thailand; Bangkok; de la Thaïlande
Vietnam; Hanoi; du Vietnam; Hanoï
Canada; Ottawa; du Canada
the United States; Washington; des États-Unis
Mexico; Mexico City; du Mexique; Mexico
Cuba; Havana; de Cuba; La Havane
Brazil; Brasilia; du Brésil
Argentina; Buenos Aires; de l'Argentine
Chile; Santiago; du Chili
Peru; Lima; du Pérou
Colombia; Bogota; de la Colombie
Australia; Canberra; de l'Australie
New Zealand; Wellington; de la Nouvelle-Zélande
"""

# animal; legs; sound; young; the animal in French; its sound; its young ("-" where there is no everyday word)
ANIMALS = """
dog; 4; woof; puppy; le chien; ouaf; le chiot
cat; 4; meow; kitten; le chat; miaou; le chaton
cow; 4; moo; calf; la vache; meuh; le veau
sheep; 4; baa; lamb; le mouton; bêê; l'agneau
horse; 4; neigh; foal; le cheval; hiii; le poulain
pig; 4; oink; piglet; le cochon; groin; le porcelet
donkey; 4; hee-haw; foal; l'âne; hi-han; l'ânon
goat; 4; -; kid; la chèvre; -; le chevreau
duck; 2; quack; duckling; le canard; coin-coin; le caneton
hen; 2; cluck; chick; la poule; cot-cot; le poussin
goose; 2; honk; gosling; l'oie; onk; l'oison
owl; 2; hoot; owlet; le hibou; hou; -
frog; 4; croak; tadpole; la grenouille; coâ; le têtard
lion; 4; roar; cub; le lion; grr; le lionceau
bear; 4; growl; cub; l'ours; grr; l'ourson
wolf; 4; howl; pup; le loup; ahou; le louveteau
mouse; 4; squeak; pup; la souris; couic; le souriceau
bee; 6; buzz; larva; l'abeille; bzz; la larve
snake; 0; hiss; -; le serpent; sss; -
kangaroo; 2; -; joey; le kangourou; -; le joey
elephant; 4; -; calf; l'éléphant; -; l'éléphanteau
rabbit; 4; -; kit; le lapin; -; le lapereau
spider; 8; -; -; l'araignée; -; -
ant; 6; -; -; la fourmi; -; -
"""

# thing; colour; the whole French sentence
COLOURS = """
the sky; blue; Le ciel est bleu.
the sea; blue; La mer est bleue.
grass; green; L'herbe est verte.
a leaf; green; La feuille est verte.
a frog; green; La grenouille est verte.
snow; white; La neige est blanche.
milk; white; Le lait est blanc.
a banana; yellow; La banane est jaune.
a lemon; yellow; Le citron est jaune.
the sun; yellow; Le soleil est jaune.
blood; red; Le sang est rouge.
a tomato; red; La tomate est rouge.
a strawberry; red; La fraise est rouge.
coal; black; Le charbon est noir.
the night; black; La nuit est noire.
an orange; orange; L'orange est orange.
a carrot; orange; La carotte est orange.
chocolate; brown; Le chocolat est marron.
an elephant; grey; L'éléphant est gris.
a flamingo; pink; Le flamant est rose.
lavender; purple; La lavande est violette.
"""

MIXES = """
red; blue; purple; rouge; bleu; violet
red; yellow; orange; rouge; jaune; orange
blue; yellow; green; bleu; jaune; vert
black; white; grey; noir; blanc; gris
red; white; pink; rouge; blanc; rose
red; green; brown; rouge; vert; marron
"""

OPPOSITES = """
hot; cold; chaud; froid
big; small; grand; petit
up; down; haut; bas
day; night; jour; nuit
good; bad; bon; mauvais
old; young; vieux; jeune
fast; slow; rapide; lent
happy; sad; heureux; triste
open; closed; ouvert; fermé
full; empty; plein; vide
light; dark; clair; sombre
wet; dry; mouillé; sec
hard; soft; dur; mou
rich; poor; riche; pauvre
long; short; long; court
left; right; gauche; droite
early; late; tôt; tard
strong; weak; fort; faible
loud; quiet; bruyant; calme
true; false; vrai; faux
yes; no; oui; non
black; white; noir; blanc
"""

DAYS = "Monday lundi Tuesday mardi Wednesday mercredi Thursday jeudi Friday vendredi Saturday samedi Sunday dimanche"
MONTHS = (
    "January janvier February février March mars April avril May mai June juin July juillet August août "
    "September septembre October octobre November novembre December décembre"
)


@dataclass(frozen=True)
class Fact:
    """One fact: `key` identifies it, `slots` fill the templates of its `kind`."""

    kind: str
    key: str
    slots: dict[str, str]


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(";")] for line in table.strip().splitlines()]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Returns the plural of a noun, such as dogs for dog. Irregular plurals are listed."""
    odd = {"sheep": "sheep", "goose": "geese", "mouse": "mice", "wolf": "wolves", "fox": "foxes"}
    return odd.get(noun, f"{noun}s")


def _du(noun: str) -> str:
    """Returns a noun after the French "of the": le chien -> du chien, la vache -> de la vache, l'oie -> de l'oie."""
    return "du " + noun[3:] if noun.startswith("le ") else "de " + noun


def _fact(kind: str, key: str, answer: str, **slots: str) -> Fact:
    filled = {"answer": answer, **slots}
    filled["Answer"] = answer[:1].upper() + answer[1:]
    return Fact(kind, f"{kind}/{key}", filled)


def _capitals() -> list[Fact]:
    facts = []
    for country, capital, fr_of, *french in _rows(CAPITALS):
        slots = {"country": country, "capital": capital, "fr_of": fr_of, "fr_capital": french[0] if french else capital}
        facts.append(_fact("capital", country, capital, **slots))
        facts.append(_fact("country", capital, country, **slots))
    return facts


def _animals() -> list[Fact]:
    facts = []
    for name, legs, sound, young, fr_name, fr_sound, fr_young in _rows(ANIMALS):
        words, fr_legs = NUMBER_WORDS[int(legs)]
        slots = {"animal": name, "an_animal": _a(name), "An_animal": _a(name).capitalize(), "fr_de": _du(fr_name),
                 "Fr_animal": fr_name[0].upper() + fr_name[1:], "number": legs, "fr_legs": fr_legs,
                 "fr_sound": fr_sound, "fr_young": fr_young, "plural": plural(name)}  # fmt: skip
        facts.append(_fact("legs", name, words, **slots))
        if sound != "-":
            facts.append(_fact("sound", name, sound, **slots))
        if young != "-" and fr_young != "-":
            facts.append(_fact("young", name, young, a_young=_a(young), **slots))
    return facts


def _colours() -> list[Fact]:
    facts = []
    for thing, colour, french in _rows(COLOURS):
        facts.append(_fact("colour", thing, colour, thing=thing, Thing=thing[0].upper() + thing[1:], french=french))
    for one, two, made, fr_one, fr_two, fr_made in _rows(MIXES):
        for a, b, fr_a, fr_b in ((one, two, fr_one, fr_two), (two, one, fr_two, fr_one)):
            facts.append(_fact("mix", f"{a}+{b}", made, a=a, b=b, fr_a=fr_a, fr_b=fr_b, fr_made=fr_made))
    return facts


def _opposites() -> list[Fact]:
    facts = []
    for one, two, fr_one, fr_two in _rows(OPPOSITES):
        for word, other, fr_word, fr_other in ((one, two, fr_one, fr_two), (two, one, fr_two, fr_one)):
            slots = {"word": word, "Word": word.capitalize(), "fr_word": fr_word, "fr_other": fr_other}
            facts.append(_fact("opposite", word, other, **slots))
    return facts


def _cycle(words: str, what: str) -> list[Fact]:
    cells = words.split()
    english, french = cells[::2], cells[1::2]
    facts = []
    for i, name in enumerate(english):
        for kind, step in (("after", 1), ("before", -1)):
            j = (i + step) % len(english)
            slots = {"x": name, "what": what, "fr_x": french[i], "fr_answer": french[j]}
            facts.append(_fact(kind, name, english[j], **slots))
    return facts


def _sums() -> list[Fact]:
    terms = range(MAX_TERM + 1)
    return [_fact("sum", f"{a}+{b}", str(a + b), a=str(a), b=str(b)) for a in terms for b in terms]


def _talk() -> list[Fact]:
    return [_fact(kind, kind, "") for kind in ("hello", "who", "how", "can", "thanks", "bye")]


def all_facts() -> list[Fact]:
    """Returns every fact of the world, in a fixed order; keys are unique."""
    facts = [*_capitals(), *_animals(), *_colours(), *_opposites(), *_cycle(DAYS, "day"), *_cycle(MONTHS, "month"),
             *_sums(), *_talk()]  # fmt: skip
    assert len({fact.key for fact in facts}) == len(facts)
    return facts
