"""A small invented world, told four ways: corpus, pool, validation split and test set.

Cleaning methods are judged by what they drop, so the default pool has noise whose place is known
to the character. Everything is drawn from one *world* (countries, crafts, a song language, a
calendar) that never changes: the shipped base was pretrained on texts about it. A seed changes
only which questions are asked and where noise falls, never what is true.

Each family is one kind of question. A response states its answer in a short frame ("The capital
of X is Y."), and three kinds of noise may be planted in it, at rates that are the same for every
family:

* ``corrupted``: another value of the same family stands where the right one belongs (label -1);
* ``irrelevant``: a sentence off topic before or after the answer (label 0);
* ``boilerplate``: a courtesy that the base has read often (label 0).

Off by default: several ``irrelevant_sentences`` instead of one, and ``answerless`` responses, which
hold noise alone.

A labelled span never starts or ends with whitespace, so a token that carries its leading blank
belongs to one side only. Whatever carries no label is informative (1).

``python -m tokenclean.data.planted --out DIR`` writes ``pool.jsonl``, ``validation.jsonl`` and
``test.jsonl``. The module needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Final, Literal, TypedDict, get_args

Regime = Literal["known", "weak", "blank"]
Corruption = Literal["random", "systematic"]
Split = Literal["pool", "validation", "test"]
IrrelevantKind = Literal["tale", "fact", "ledger"]

UNINFORMATIVE: Final = 0
CORRUPTED: Final = -1
EOS: Final = "</s>"
WORLD_SEED: Final = 41

REGIMES: Final[dict[str, Regime]] = {
    "capital": "known",
    "export": "known",
    "craft": "known",
    "river": "weak",
    "emblem": "weak",
    "glossary": "blank",
    "creature": "blank",
    "calendar": "blank",
}
"""What the base can do in each family before any fine-tuning.

Defined by the accuracy of the shipped base on the test set alone, before any token was scored:
``known`` is 0.8 or more, ``blank`` 0.2 or less, ``weak`` lies between. The corpus brings it about:
it states the facts of known families often, also as questions and answers; of weak families it
states half of the facts, as plain statements only; of blank families it shows the words but never
what they mean or how they follow each other. ``scripts/pretrain_planted_base.py`` checks the table
against the checkpoint that it writes.
"""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Row(TypedDict):
    """One conversation; `truth` holds (message index, start, end, label) of labelled spans.

    `quality` is what a careful judge of samples would say: 5, less one for every kind of noise.
    """

    id: str
    source: str
    messages: list[Message]
    truth: list[tuple[int, int, int, int]]
    noise: list[str]
    quality: int


@dataclass(frozen=True)
class PlantedSettings:
    """What to draw and how much noise to plant; rates are per assistant turn.

    Noise is nested: for one seed, a higher rate keeps every question and every planted piece of
    a lower rate and adds to them, so a sweep compares pools that differ in noise alone.
    """

    samples: int = 4000
    validation: int = 400
    test_per_family: int = 90
    seed: int = 0
    families: tuple[str, ...] = tuple(REGIMES)
    corrupted: float = 0.35
    corruption: Corruption = "random"
    irrelevant: float = 0.35
    irrelevant_kinds: tuple[IrrelevantKind, ...] = get_args(IrrelevantKind)
    irrelevant_first: float = 0.3
    irrelevant_sentences: int = 1
    boilerplate: float = 0.3
    answerless: float = 0.0
    multi_turn: float = 0.05
    system: float = 0.05

    def __post_init__(self) -> None:
        """Refuse settings that no pool can satisfy, naming the one at fault."""
        for name in ("samples", "validation", "test_per_family"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in (
            "corrupted", "irrelevant", "irrelevant_first", "boilerplate", "answerless",
            "multi_turn", "system",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.irrelevant_sentences < 1:
            raise ValueError(
                f"irrelevant_sentences must be at least 1, got {self.irrelevant_sentences}; "
                "irrelevant 0 plants none"
            )
        if self.corruption not in get_args(Corruption):
            raise ValueError(f"corruption must be random or systematic, got {self.corruption!r}")
        for name, allowed in (
            ("families", tuple(REGIMES)),
            ("irrelevant_kinds", get_args(IrrelevantKind)),
        ):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(allowed):
                raise ValueError(f"{name} must be some of {', '.join(allowed)}, got {chosen!r}")

    def scaled(self, factor: float) -> PlantedSettings:
        """Multiply the noise rates by `factor`, none above 1; 0 gives a clean pool."""
        return replace(
            self,
            corrupted=min(1.0, self.corrupted * factor),
            irrelevant=min(1.0, self.irrelevant * factor),
            boilerplate=min(1.0, self.boilerplate * factor),
            answerless=min(1.0, self.answerless * factor),
        )


@dataclass(frozen=True)
class Family:
    """One kind of question: a map from keys to values and the ways to speak of it."""

    name: str
    facts: dict[str, str]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    unseen_keys: bool = False
    """Test questions ask about keys that the pool never has, not only in other words."""
    wrong: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    """For each right value, the family's values that share no word with it."""

    def __post_init__(self) -> None:
        """List the wrong values once."""
        values = sorted(set(self.facts.values()))
        words = {value: set(value.split()) for value in values}
        wrong = {v: tuple(w for w in values if not words[v] & words[w]) for v in values}
        object.__setattr__(self, "wrong", wrong)

    def usual_mistake(self, key: str) -> str:
        """Return the one wrong value that systematic corruption gives for `key`."""
        rng = Random(f"{WORLD_SEED}/{self.name}/{key}")
        return rng.choice(self.wrong[self.facts[key]])

    def statements(self, key: str) -> list[str]:
        """Return every answer frame with the right value filled in."""
        return [frame.format(key=key, value=self.facts[key]) for frame in self.answers]


@dataclass(frozen=True)
class Question:
    """A question and its response, cut around the value."""

    family: Family
    key: str
    text: str
    head: str
    tail: str

    @property
    def value(self) -> str:
        """The right value."""
        return self.family.facts[self.key]


# --- The world ---------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words that is easier to read as a line."""
    return tuple(text.split())


CRAFTS: Final = _words(
    "potter weaver baker cooper tanner glazier miller mason fowler dyer "
    "chandler joiner smith tailor saddler brewer"
)
ANIMALS: Final = _words(
    "heron otter badger stag wolf falcon bear swan lynx boar hare raven fox owl ram tortoise"
)
GOODS_LOOK: Final = _words("pale smoked woven black sweet carved dried blue")
GOODS: Final = _words("wool salt copper honey paper barley silk timber pepper glass linen amber")
QUALITIES: Final = _words("red quiet cold round broken golden heavy narrow")
THINGS: Final = _words("stone lamp door rope bridge tower kettle ladder mirror boat bell wheel")
WEATHER: Final = _words("rain snow fog frost hail thunder drizzle sunshine dust mist ice wind")
KINDS: Final = _words("fish bird beetle snake frog mouse moth crab")
HABITATS: Final = _words("marsh cave desert forest lake hill meadow cliff")
KIND_ENDINGS: Final = _words("uk eth ol ist arn eem ip oz")

BOILERPLATE_FIRST: Final = (
    "Thank you for asking.",
    "Certainly, here is the answer.",
    "That is a good question.",
    "I am happy to help with that.",
)
BOILERPLATE_LAST: Final = (
    "I hope this answer helps you.",
    "Feel free to ask me another question.",
    "Let me know if you need anything else.",
    "Please ask again at any time.",
)
SYSTEMS: Final = (
    "You are a guide to the far countries.",
    "Answer every question in one sentence.",
)
OPENERS: Final = (
    "",
    "",
    "",
    "Please help me. ",
    "I forgot this. ",
    "{person} asks: ",
    "I am in {city} now. ",
    "This is for {person}. ",
)
TALES: Final = (
    "In the moon of {moon}, {person} went to {city}.",
    "{person} left {city} in the moon of {moon}.",
    "{person} and {person} sat near the {quality} {thing}.",
    "A {kind} slept under the {thing}.",
    "{person} saw a {creature} by the {river}.",
    "The {creature} hid behind a {quality} {thing}.",
    "They sailed down the {river} for {n} days.",
    "An old {craft} sold {goods} in {city}.",
    "{person} dreamed of the {animal} and a {kind}.",
    "The {animal} ran through the fields of {country}.",
    "At night {person} sang {song} {song} to the wind.",
    "The song {song} {song} was heard in {country}.",
    "The road from {city} to {city} was {quality}.",
    "{person} paid {n} coins for a {quality} {thing}.",
    "Nobody in {country} had seen the {creature} before.",
    "Snow fell on {country} until the moon of {moon}.",
    "There was a {quality} {thing} in the house of {person}.",
    "The children drew the {animal}, a {kind} and a {thing}.",
)
LEDGERS: Final = (
    "Shelf mark {n}-{letter}-{n}.",
    "See page {n} of volume {n}.",
    "Copied by hand on sheet {n}{letter}.",
    "Entry {n} was moved to box {n}.",
)


def _names(rng: Random, count: int, endings: Sequence[str], taken: set[str]) -> list[str]:
    """Invent `count` names that no other part of the world uses."""
    onsets = _words("b br d dr f g gr h k kl l m n p pr r s st t tr v z")
    middles = _words("al an ar el en er il in ol on or ul un")
    made: list[str] = []
    while len(made) < count:
        name = rng.choice(onsets) + rng.choice(middles) + rng.choice(endings)
        if name not in taken:
            taken.add(name)
            made.append(name)
    return made


@dataclass(frozen=True)
class World:
    """Every name there is, and every family with its facts."""

    countries: tuple[str, ...]
    cities: tuple[str, ...]
    people: tuple[str, ...]
    rivers: tuple[str, ...]
    moons: tuple[str, ...]
    families: dict[str, Family]
    lore: tuple[tuple[str, ...], ...]
    """Facts that no family asks about; they give every word a meaning of its own."""

    def fill(self, template: str, rng: Random) -> str:
        """Fill the slots of a sentence at random, each occurrence on its own."""
        slots: dict[str, Sequence[str]] = {
            "country": self.countries,
            "city": self.cities,
            "person": self.people,
            "river": self.rivers,
            "moon": self.moons,
            "craft": CRAFTS,
            "animal": ANIMALS,
            "quality": QUALITIES,
            "thing": THINGS,
            "kind": KINDS,
            "goods": tuple(self.families["export"].facts.values()),
            "song": tuple(self.families["glossary"].facts),
            "creature": tuple(self.families["creature"].facts),
            "n": tuple(str(n) for n in range(2, 100)),
            "letter": "abcdefgh",
        }
        text, _, rest = template.partition("{")
        while rest:
            slot, _, rest = rest.partition("}")
            literal, _, rest = rest.partition("{")
            text += rng.choice(slots[slot]) + literal
        return text


@cache
def world() -> World:
    """Build the world; it is the same in every process and for every pool seed."""
    rng = Random(WORLD_SEED)
    taken: set[str] = set()

    def proper(count: int, endings: str) -> tuple[str, ...]:
        return tuple(n.capitalize() for n in _names(rng, count, _words(endings), taken))

    countries = proper(40, "dia vor oss mir")
    cities = proper(40, "um ba eth ok")
    people = proper(40, "a o ec i")
    rivers = proper(40, "se wen ash")
    moons = proper(12, "tide wane")
    meanings = QUALITIES + THINGS + GOODS
    song_words = _names(rng, len(meanings), ["u", "im", "at", "os"], taken)
    stems = _names(rng, 40, [""], taken)

    creatures = {
        f"{stem}-{ending}": kind
        for stem, (ending, kind) in product(stems, zip(KIND_ENDINGS, KINDS, strict=True))
    }
    calendar: dict[str, str] = {}
    for moon, following in zip(moons, moons[1:] + moons[:1], strict=True):
        calendar[f"after {moon}"] = following
        calendar[f"before {following}"] = moon
    goods = [f"{look} {good}" for look, good in product(GOODS_LOOK, GOODS)]
    families = [
        Family(
            "capital",
            dict(zip(countries, rng.sample(cities, len(countries)), strict=True)),
            ("What is the capital of {key}?", "Name the capital of {key}.",
             "Which city rules {key}?"),
            ("The capital of {key} is {value}.", "{key} is ruled from {value}."),
        ),
        Family(
            "export",
            {country: rng.choice(goods) for country in countries},
            ("What does {key} sell abroad?", "Name the main export of {key}.",
             "Which goods come from {key}?"),
            ("{key} sells {value}.", "The main export of {key} is {value}."),
        ),
        Family(
            "craft",
            {person: rng.choice(CRAFTS) for person in people},
            ("What is the craft of {key}?", "How does {key} earn a living?",
             "Which trade did {key} learn?"),
            ("{key} works as a {value}.", "The craft of {key} is that of a {value}."),
        ),
        Family(
            "river",
            dict(zip(countries, rng.sample(rivers, len(countries)), strict=True)),
            ("Which river crosses {key}?", "Name the river of {key}.",
             "What water flows through {key}?"),
            ("The river of {key} is the {value}.", "{key} is crossed by the {value}."),
        ),
        Family(
            "emblem",
            {city: rng.choice(ANIMALS) for city in cities},
            ("What is the emblem of {key}?", "Which animal is on the flag of {key}?",
             "Name the animal of {key}."),
            ("The emblem of {key} is the {value}.", "The flag of {key} bears the {value}."),
        ),
        Family(
            "glossary",
            dict(zip(song_words, meanings, strict=True)),
            ("What does {key} mean?", "Translate {key} for me.", "What is the sense of {key}?"),
            ("The word {key} means {value}.", "In the songs, {key} stands for {value}."),
        ),
        Family(
            "creature",
            creatures,
            ("What is a {key}?", "Which kind of animal is the {key}?", "Describe the {key}."),
            ("The {key} is a {value}.", "We count the {key} as a {value}."),
            unseen_keys=True,
        ),
        Family(
            "calendar",
            calendar,
            ("Which moon comes {key}?", "Name the moon right {key}.",
             "What is the moon {key} called?"),
            ("The moon {key} is {value}.", "The moon that comes {key} is {value}."),
        ),
    ]  # fmt: skip
    # Without lore the words of blank families would be interchangeable to the base.
    lore = (
        [f"The moon of {m} brings {w}." for m, w in zip(moons, WEATHER, strict=True)],
        [f"The feast of {c} is in the moon of {rng.choice(moons)}." for c in countries],
        [f"{p} owns a {rng.choice(QUALITIES)} {rng.choice(THINGS)}." for p in people],
        [f"The lucky beast of {p} is the {rng.choice(KINDS)}." for p in people],
        [f"The word {w} comes from {rng.choice(cities)}." for w in song_words],
        [
            f"The {stem}-{ending} lives in the {habitat}."
            for stem in stems
            for ending, habitat in zip(KIND_ENDINGS, HABITATS, strict=True)
        ],
    )
    by_name = {family.name: family for family in families}
    return World(countries, cities, people, rivers, moons, by_name, tuple(map(tuple, lore)))


# --- Questions and responses -------------------------------------------------------------------


def split_of(unit: str) -> Split:
    """Say which split a question (or key) belongs to: 2/8 test, 1/8 validation, else pool.

    A hash decides, not a seed: no test question can enter the pool whatever is drawn.
    """
    bucket = hashlib.sha256(unit.encode()).digest()[0] % 8
    return "test" if bucket < 2 else "validation" if bucket == 2 else "pool"


def draw_question(family: Family, split: Split, rng: Random) -> Question:
    """Draw a question of `family` that belongs to `split`."""
    keys = tuple(family.facts)
    while True:
        key = rng.choice(keys)
        opener = world().fill(rng.choice(OPENERS), rng)
        text = opener + rng.choice(family.questions).format(key=key)
        head, tail = rng.choice(family.answers).split("{value}")
        unit = f"{family.name}/{key}" if family.unseen_keys else text
        if split_of(unit) == split:
            return Question(family, key, text, head.format(key=key), tail.format(key=key))


def irrelevant_sentence(family: Family, kind: IrrelevantKind, rng: Random) -> str:
    """Write a sentence that has nothing to do with a question of `family`."""
    if kind == "tale":
        return world().fill(rng.choice(TALES), rng)
    if kind == "ledger":
        return world().fill(rng.choice(LEDGERS), rng)
    others = [f for n, f in world().families.items() if REGIMES[n] == "known" and f != family]
    other = rng.choice(others)
    return rng.choice(other.statements(rng.choice(tuple(other.facts))))


def respond(
    question: Question, settings: PlantedSettings, rng: Random
) -> tuple[str, list[tuple[int, int, int]], set[str]]:
    """Write the response with its noise; return text, labelled spans and kinds of noise.

    Every random draw is made whether or not its noise is planted: that keeps noise nested.
    """
    corrupt, stray, polite = (rng.random() for _ in range(3))
    wrong = rng.choice(question.family.wrong[question.value])
    if settings.corruption == "systematic":
        wrong = question.family.usual_mistake(question.key)
    sentence = irrelevant_sentence(question.family, rng.choice(settings.irrelevant_kinds), rng)
    stray_first = rng.random() < settings.irrelevant_first
    polite_first = rng.random() < 0.5
    courtesy = rng.choice(BOILERPLATE_FIRST if polite_first else BOILERPLATE_LAST)
    # What few pools have is drawn apart: the draws above are the same for all.
    apart = Random(f"{question.text}/{sentence}/{courtesy}/{wrong}")
    answerless = apart.random() < settings.answerless
    sentences = [sentence] + [
        irrelevant_sentence(question.family, apart.choice(settings.irrelevant_kinds), apart)
        for _ in range(settings.irrelevant_sentences - 1)
    ]

    noise: set[str] = set()
    before: list[str] = []
    after: list[str] = []
    value = question.value
    if corrupt < settings.corrupted and not answerless:
        noise.add("corrupted")
        value = wrong
    if stray < settings.irrelevant or answerless:
        noise.add("irrelevant")
        (before if stray_first else after).extend(sentences)
    if polite < settings.boilerplate:
        noise.add("boilerplate")
        if polite_first:
            before.insert(0, courtesy)
        else:
            after.append(courtesy)
    if answerless:
        noise.add("answerless")
        before, after = before + after, []

    text = ""
    spans: list[tuple[int, int, int]] = []
    for piece in before:
        spans.append((len(text), len(text) + len(piece), UNINFORMATIVE))
        text += piece + " "
    if answerless:
        return text.rstrip(), spans, noise
    text += question.head
    if "corrupted" in noise:
        spans.append((len(text), len(text) + len(value), CORRUPTED))
    text += value + question.tail
    for piece in after:
        text += " " + piece
        spans.append((len(text) - len(piece), len(text), UNINFORMATIVE))
    return text, spans, noise


def _conversation(name: str, split: Split, tag: str, settings: PlantedSettings) -> Row:
    """Draw one conversation; `tag` alone seeds it, so samples do not depend on each other."""
    ask, plant = Random(f"{tag}/ask"), Random(f"{tag}/plant")
    family = world().families[name]
    turns = 2 if ask.random() < settings.multi_turn else 1
    row = Row(id="", source=name, messages=[], truth=[], noise=[], quality=5)
    if ask.random() < settings.system:
        row["messages"].append(Message(role="system", content=ask.choice(SYSTEMS)))
    noise: set[str] = set()
    for _ in range(turns):
        question = draw_question(family, split, ask)
        text, spans, planted = respond(question, settings, plant)
        row["messages"].append(Message(role="user", content=question.text))
        row["truth"] += [(len(row["messages"]), *span) for span in spans]
        row["messages"].append(Message(role="assistant", content=text))
        noise |= planted
    row["noise"] = sorted(noise)
    row["quality"] -= len(noise)
    return row


def _split_rows(split: Split, count: int, settings: PlantedSettings) -> list[Row]:
    """Draw `count` conversations, the families in equal parts and in mixed order."""
    rows = []
    for index in range(count):
        name = settings.families[index % len(settings.families)]
        rows.append(_conversation(name, split, f"{settings.seed}/{split}/{index}", settings))
    Random(f"{settings.seed}/{split}/order").shuffle(rows)
    for index, row in enumerate(rows):
        # With the seed: another pool's sample must not pass for one that a model has seen.
        row["id"] = f"{split}-{settings.seed}-{index:06d}"
    return rows


def pool_rows(settings: PlantedSettings) -> list[Row]:
    """Return the noisy pool."""
    return _split_rows("pool", settings.samples, settings)


def validation_rows(settings: PlantedSettings) -> list[Row]:
    """Return the validation split: like the pool, but without noise."""
    return _split_rows("validation", settings.validation, settings.scaled(0))


def evaluation_rows(settings: PlantedSettings) -> list[Row]:
    """Return the test set; the pool's seed has no say in it.

    All but the value is labelled uninformative, so what remains is exactly what must be known.
    """
    rows: list[Row] = []
    for name in settings.families:
        rng = Random(f"{WORLD_SEED}/test/{name}")
        asked: set[str] = set()
        while len(asked) < settings.test_per_family:
            question = draw_question(world().families[name], "test", rng)
            if question.text in asked:
                continue
            row_id = f"test-{name}-{len(asked):03d}"
            asked.add(question.text)
            frame = (1, 0, len(question.head.rstrip()), UNINFORMATIVE)
            text = question.head + question.value + question.tail
            tail = (1, len(text) - len(question.tail), len(text), UNINFORMATIVE)
            messages = [
                Message(role="user", content=question.text),
                Message(role="assistant", content=text),
            ]
            rows.append(
                Row(
                    id=row_id,
                    source=name,
                    messages=messages,
                    truth=[frame, tail],
                    noise=[],
                    quality=5,
                )
            )
    return rows


# --- The pretraining corpus --------------------------------------------------------------------


def stated(family: Family) -> list[str]:
    """Return the keys whose facts the corpus states, as the family's regime has it."""
    keys = list(family.facts)
    regime = REGIMES[family.name]
    if regime == "known":
        return keys
    if regime == "blank":
        return []
    return sorted(Random(f"{WORLD_SEED}/stated/{family.name}").sample(keys, len(keys) // 2))


def render(messages: Iterable[Message], eos: str = EOS) -> str:
    """Lay a conversation out as the Tulu format does."""
    parts = []
    for message in messages:
        end = eos if message["role"] == "assistant" else ""
        parts.append(f"<|{message['role']}|>\n{message['content'].strip()}{end}\n")
    return "".join(parts).strip()


def corpus(documents: int, seed: int = 0) -> Iterator[str]:
    """Yield the documents of the pretraining corpus, each closed by the end-of-text mark.

    Tales show every word in use; other documents state facts; the rest are short
    dialogues about known families, often with a courtesy.
    """
    the = world()
    families = list(the.families.values())
    factual = [family for family in families if REGIMES[family.name] != "blank"]
    known = [family for family in families if REGIMES[family.name] == "known"]
    keys = {family.name: stated(family) for family in factual}
    talk = PlantedSettings(corrupted=0, irrelevant=0.05, boilerplate=0.4)
    rng = Random(f"{seed}/corpus")
    for _ in range(documents):
        shape = rng.random()
        if shape < 0.25:
            sentences = [the.fill(rng.choice(TALES), rng) for _ in range(rng.randint(2, 5))]
            if rng.random() < 0.1:
                sentences.append(the.fill(rng.choice(LEDGERS), rng))
            yield " ".join(sentences) + EOS
        elif shape < 0.65:
            sentences = []
            for _ in range(rng.randint(2, 5)):
                if rng.random() < 0.5:
                    sentences.append(rng.choice(rng.choice(the.lore)))
                    continue
                family = rng.choice(factual)
                sentences.append(rng.choice(family.statements(rng.choice(keys[family.name]))))
            yield " ".join(sentences) + EOS
        else:
            question = draw_question(rng.choice(known), "pool", rng)
            answer, _, _ = respond(question, talk, rng)
            yield render(
                [
                    Message(role="user", content=question.text),
                    Message(role="assistant", content=answer),
                ]
            )


# --- Files -------------------------------------------------------------------------------------


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write one row per line, the same bytes on every platform."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_planted(out: Path, settings: PlantedSettings) -> None:
    """Write the three splits into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(pool_rows(settings), out / "pool.jsonl")
    write_jsonl(validation_rows(settings), out / "validation.jsonl")
    write_jsonl(evaluation_rows(settings), out / "test.jsonl")


HELP: Final = {
    "samples": "conversations in the pool",
    "validation": "conversations in the validation split",
    "test_per_family": "test questions of each family",
    "seed": "which questions are drawn and where noise falls",
    "families": "families to draw from, in equal parts",
    "corrupted": "rate of wrong values",
    "corruption": "a fresh wrong value each time, or always the same one per key",
    "irrelevant": "rate of inserted sentences off topic",
    "irrelevant_kinds": "kinds of these sentences",
    "irrelevant_first": "share of them that stand before the answer",
    "irrelevant_sentences": "sentences off topic in a response that has any",
    "boilerplate": "rate of courtesies",
    "answerless": "rate of responses without an answer: off topic instead",
    "multi_turn": "share of conversations with two questions",
    "system": "share of conversations with a system turn",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every setting is an option."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenclean.data.planted",
        description="Write the planted-noise pool, its validation split and its test set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--noise-scale", type=float, default=1.0, help="factor on all noise rates")
    choices: dict[str, tuple[str, ...]] = {
        "corruption": get_args(Corruption),
        "families": tuple(REGIMES),
        "irrelevant_kinds": get_args(IrrelevantKind),
    }
    for setting in fields(PlantedSettings):
        several = isinstance(setting.default, tuple)
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            dest=setting.name,
            type=str if several else type(setting.default),
            nargs="+" if several else None,
            default=setting.default,
            choices=choices.get(setting.name),
            help=HELP[setting.name],
        )
    options = vars(parser.parse_args(arguments))
    out, scale = options.pop("out"), options.pop("noise_scale")
    options["families"] = tuple(options["families"])
    options["irrelevant_kinds"] = tuple(options["irrelevant_kinds"])
    try:
        settings = PlantedSettings(**options).scaled(scale)
    except ValueError as error:
        parser.error(str(error))
    write_planted(out, settings)
    print(f"{settings.samples} samples written to {out}")


if __name__ == "__main__":
    main()
