"""The planted pool is deterministic, its truth is exact, and the shipped base fits its regimes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from tokenclean.data import planted
from tokenclean.data.planted import PlantedSettings, Row, pool_rows, validation_rows, world

BASE = Path(planted.__file__).parent / "planted_base"
SMALL = PlantedSettings(samples=800, validation=80, test_per_family=20)


def answers(row: Row) -> list[tuple[int, str]]:
    """Return index and text of the assistant turns."""
    turns = enumerate(row["messages"])
    return [(i, turn["content"]) for i, turn in turns if turn["role"] == "assistant"]


def spans(rows: list[Row], label: int) -> list[tuple[Row, int, str]]:
    """Return (row, message index, text) of every span with `label`."""
    return [
        (row, index, row["messages"][index]["content"][start:end])
        for row in rows
        for index, start, end, found in row["truth"]
        if found == label
    ]


def key_asked(row: Row, index: int) -> str:
    """Return the key that the question before the response `index` asks about."""
    asked = row["messages"][index - 1]["content"]
    family = world().families[row["source"]]
    keys = [key for key in family.facts if any(asked.endswith(q.format(key=key))
                                               for q in family.questions)]  # fmt: skip
    assert len(keys) == 1, asked
    return keys[0]


def test_same_seed_same_bytes_other_seed_other_pool(tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        planted.main(["--out", str(tmp_path / name), "--samples", "120", "--seed", seed])
    a, b, c = (
        {split: (tmp_path / name / f"{split}.jsonl").read_bytes()
         for split in ("pool", "validation", "test")}
        for name in "abc"
    )  # fmt: skip
    assert a == b
    assert a["pool"] != c["pool"]
    assert a["validation"] != c["validation"]
    assert a["test"] == c["test"]
    rows = [json.loads(line) for line in a["pool"].splitlines()]
    assert len(rows) == 120
    assert set(rows[0]) == {"id", "source", "messages", "truth", "noise", "quality"}


def test_rows_are_tulu_conversations() -> None:
    rows = pool_rows(SMALL)
    assert len({row["id"] for row in rows}) == len(rows) == 800
    counts: dict[str, int] = defaultdict(int)
    shapes: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["source"]] += 1
        shapes["".join(turn["role"][0] for turn in row["messages"])] += 1
        assert all(turn["content"] == turn["content"].strip() for turn in row["messages"])
    assert counts == dict.fromkeys(planted.REGIMES, 100)
    assert set(shapes) == {"ua", "uaua", "sua", "suaua"}
    assert shapes["ua"] > 0.85 * 800


def test_a_corrupted_span_is_a_wrong_value_in_place_of_the_right_one() -> None:
    found = spans(pool_rows(SMALL), planted.CORRUPTED)
    assert len(found) > 200
    for row, index, text in found:
        family = world().families[row["source"]]
        right = family.facts[key_asked(row, index)]
        assert text in family.facts.values()
        assert not set(text.split()) & set(right.split())
        start = next(s for i, s, _, label in row["truth"] if i == index and label == -1)
        content = row["messages"][index]["content"]
        repaired = content[:start] + right + content[start + len(text) :]
        assert any(statement in repaired for statement in family.statements(key_asked(row, index)))


def test_systematic_corruption_is_one_mistake_per_key_and_random_is_not() -> None:
    def mistakes(corruption: planted.Corruption, seed: int) -> dict[tuple[str, str], set[str]]:
        settings = PlantedSettings(samples=2000, seed=seed, corrupted=1, corruption=corruption)
        made: dict[tuple[str, str], set[str]] = defaultdict(set)
        for row, index, text in spans(pool_rows(settings), planted.CORRUPTED):
            made[row["source"], key_asked(row, index)].add(text)
        return made

    first, second = mistakes("systematic", 0), mistakes("systematic", 1)
    assert all(len(values) == 1 for values in first.values())
    assert all(second[key] == values for key, values in first.items() if key in second)
    assert len(mistakes("random", 0)["capital", world().countries[0]]) > 3


def test_uninformative_spans_are_whole_sentences_around_the_answer() -> None:
    found = spans(pool_rows(SMALL), planted.UNINFORMATIVE)
    assert len(found) > 300
    courtesies = {*planted.BOILERPLATE_FIRST, *planted.BOILERPLATE_LAST}
    for row, index, text in found:
        assert text == text.strip() and text.endswith(".")
        assert ("boilerplate" if text in courtesies else "irrelevant") in row["noise"]
        content = row["messages"][index]["content"]
        left, right = content.split(text, maxsplit=1)
        assert left == "" or left.endswith(". ")
        assert right == "" or right.startswith(" ")


def test_rest_of_a_response_is_the_answer_sentence() -> None:
    for row in pool_rows(PlantedSettings(samples=400, corrupted=0, multi_turn=0, system=0)):
        (index, content), = answers(row)  # fmt: skip
        for _, start, end, _ in reversed(row["truth"]):
            content = content[:start] + content[end:]
        statements = world().families[row["source"]].statements(key_asked(row, index))
        assert content.strip() in statements


def test_noise_rates_are_the_settings_in_every_family() -> None:
    rates = {"corrupted": 0.4, "irrelevant": 0.2, "boilerplate": 0.5}
    settings = PlantedSettings(
        samples=8000, multi_turn=0, corrupted=0.4, irrelevant=0.2, boilerplate=0.5
    )
    rows = pool_rows(settings)
    for kind, rate in rates.items():
        for name in planted.REGIMES:
            own = [row for row in rows if row["source"] == name]
            share = sum(kind in row["noise"] for row in own) / len(own)
            assert share == pytest.approx(rate, abs=0.06), (kind, name)


def test_irrelevant_sentences_come_in_the_kinds_asked_for() -> None:
    settings = PlantedSettings(samples=80, irrelevant=1, boilerplate=0, corrupted=0,
                               irrelevant_kinds=("ledger",), irrelevant_first=1)  # fmt: skip
    starts = tuple(sentence.partition("{")[0] for sentence in planted.LEDGERS)
    for _, _, text in spans(pool_rows(settings), planted.UNINFORMATIVE):
        assert text.startswith(starts)


def test_several_sentences_and_missing_answers_change_nothing_else() -> None:
    plain = pool_rows(PlantedSettings(samples=300, multi_turn=0))
    more = pool_rows(PlantedSettings(samples=300, multi_turn=0, irrelevant_sentences=3))
    assert [r["messages"][-2] for r in plain] == [r["messages"][-2] for r in more]
    courtesies = {*planted.BOILERPLATE_FIRST, *planted.BOILERPLATE_LAST}
    for one, three in zip(plain, more, strict=True):
        assert one["noise"] == three["noise"]
        if "irrelevant" not in one["noise"]:
            assert one == three
            continue
        stray, strays = (
            [
                text
                for message, start, end, label in row["truth"]
                if label == planted.UNINFORMATIVE
                and (text := row["messages"][message]["content"][start:end]) not in courtesies
            ]
            for row in (one, three)
        )
        assert len(stray) == 1 and len(strays) == 3 and strays[0] == stray[0]

    bare = pool_rows(PlantedSettings(samples=300, multi_turn=0, answerless=0.5))
    lost = [row for row in bare if "answerless" in row["noise"]]
    assert 100 < len(lost) < 200
    assert [r for r in bare if "answerless" not in r["noise"]] == [
        p for p, r in zip(plain, bare, strict=True) if "answerless" not in r["noise"]
    ]
    for row in lost:
        content = row["messages"][-1]["content"]
        labelled = " ".join(content[start:end] for _, start, end, _ in row["truth"])
        assert labelled == content and "corrupted" not in row["noise"]


def test_noise_is_nested_so_a_sweep_changes_nothing_else() -> None:
    low, high = (pool_rows(replaced) for replaced in (SMALL.scaled(0.5), SMALL))
    for less, more in zip(low, high, strict=True):
        assert less["id"] == more["id"] and set(less["noise"]) <= set(more["noise"])
        assert more["quality"] == 5 - len(more["noise"])
        asked = [[m["content"] for m in row["messages"] if m["role"] == "user"]
                 for row in (less, more)]  # fmt: skip
        assert asked[0] == asked[1]


def test_without_noise_nothing_is_labelled() -> None:
    clean = pool_rows(SMALL.scaled(0)) + validation_rows(SMALL)
    assert all(row["truth"] == [] and row["noise"] == [] and row["quality"] == 5 for row in clean)


def test_no_test_question_is_ever_in_pool_or_validation() -> None:
    asked = {row["messages"][0]["content"] for row in planted.evaluation_rows(PlantedSettings())}
    assert len(asked) == 90 * len(planted.REGIMES)
    for seed in (0, 1, 2, 17):
        settings = PlantedSettings(seed=seed)
        for row in pool_rows(settings) + validation_rows(settings):
            assert not asked & {turn["content"] for turn in row["messages"]}


def test_test_rows_leave_exactly_the_value_unlabelled() -> None:
    for row in planted.evaluation_rows(SMALL):
        text = row["messages"][1]["content"]
        kept = [True] * len(text)
        for index, start, end, label in row["truth"]:
            assert (index, label) == (1, planted.UNINFORMATIVE)
            kept[start:end] = [False] * (end - start)
        rest = "".join(c for c, keep in zip(text, kept, strict=True) if keep)
        assert rest.strip() == world().families[row["source"]].facts[key_asked(row, 1)]


def test_the_corpus_keeps_blank_families_to_itself() -> None:
    documents = list(planted.corpus(3000))
    assert documents == list(planted.corpus(3000))
    text = "\n".join(documents)
    for name, regime in planted.REGIMES.items():
        family = world().families[name]
        told = {key for key in family.facts if any(s in text for s in family.statements(key))}
        assert told == set(planted.stated(family))
        assert len(told) == {"known": 1, "weak": 0.5, "blank": 0}[regime] * len(family.facts)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"corrupted": 1.5}, "corrupted"),
        ({"samples": -1}, "samples"),
        ({"corruption": "odd"}, "corruption"),
        ({"families": ("capitals",)}, "families"),
        ({"irrelevant_kinds": ()}, "irrelevant_kinds"),
        ({"irrelevant_sentences": 0}, "irrelevant_sentences"),
        ({"answerless": -0.1}, "answerless"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        PlantedSettings(**settings)  # type: ignore[arg-type]


def test_the_base_is_small_and_documented() -> None:
    names = {path.name for path in BASE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "base_card.json"} <= names
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 3_000_000
    card = json.loads((BASE / "base_card.json").read_text(encoding="utf-8"))
    assert card["regime"] == planted.REGIMES


def test_the_tokenizer_round_trips_any_text() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    texts = ["a  b .  c ?\n", " don 't , é\u4e2d\U0001f600\t\r\n", "<|user|>\nWhat is a dov-uk?\n"]
    texts += [planted.render(row["messages"]) for row in pool_rows(SMALL)]
    for text in texts:
        encoded = tokenizer(text)["input_ids"]
        assert encoded[0] == tokenizer.bos_token_id
        assert tokenizer.decode(encoded[1:]) == text


def test_the_base_fits_the_table_of_regimes() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        BASE, local_files_only=True, dtype=torch.float32
    ).eval()
    hits: dict[str, list[bool]] = defaultdict(list)
    for row in planted.evaluation_rows(PlantedSettings()):
        text = planted.render(row["messages"])
        value = world().families[row["source"]].facts[key_asked(row, 1)]
        # Greedy continuation from the gold text before the value must spell the value.
        prompt = text[: text.rindex(value)].rstrip()
        ids = tokenizer(prompt)["input_ids"]
        gold = tokenizer(" " + value, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + gold])).logits[0]
        hits[row["source"]].append(logits[len(ids) - 1 : -1].argmax(-1).tolist() == gold)
    card = json.loads((BASE / "base_card.json").read_text(encoding="utf-8"))
    bounds = {"known": (0.8, 1.0), "weak": (0.2, 0.8), "blank": (0.0, 0.2)}
    for name, regime in planted.REGIMES.items():
        accuracy = sum(hits[name]) / len(hits[name])
        low, high = bounds[regime]
        assert low <= accuracy <= high, (name, accuracy)
        assert accuracy == pytest.approx(card["accuracy"][name], abs=0.02)
