"""TyDi QA's gold-passage task as the Token Cleaning paper asks it.

In every language: an instruction in that language, one fixed training example, then passage and
question; at most 200 validation questions; F1 as SQuAD computes it. Passages are cut to
``cut_context`` tokens by whoever runs the task and knows the tokenizer.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

SEED = 42
QUESTIONS = 200

#: Language -> its name in the data, the instruction, and the words for passage, question, answer.
PROMPTS: dict[str, tuple[str, str, str, str, str]] = {
    "ar": (
        "arabic",
        "أجب عن السؤال التالي بالاعتماد على المعلومات الواردة في النص.",
        *("النص:", "السؤال:", "الجواب:"),
    ),
    "bn": (
        "bengali",
        "নিচের অনুচ্ছেদে দেওয়া তথ্যের ভিত্তিতে প্রশ্নটির উত্তর দাও।",
        *("অনুচ্ছেদ:", "প্রশ্ন:", "উত্তর:"),
    ),
    "en": (
        "english",
        "Use the information in the passage to answer the question below.",
        *("Passage:", "Question:", "Answer:"),
    ),
    "fi": (
        "finnish",
        "Vastaa alla olevaan kysymykseen tekstikatkelman tietojen perusteella.",
        *("Teksti:", "Kysymys:", "Vastaus:"),
    ),
    "id": (
        "indonesian",
        "Jawablah pertanyaan di bawah ini berdasarkan informasi dalam bacaan.",
        *("Bacaan:", "Pertanyaan:", "Jawaban:"),
    ),
    "ko": (
        "korean",
        "지문에 나온 정보를 바탕으로 아래 질문에 답하십시오.",
        *("지문:", "질문:", "답:"),
    ),
    "ru": (
        "russian",
        "Ответьте на вопрос ниже, опираясь на сведения из отрывка.",
        *("Отрывок:", "Вопрос:", "Ответ:"),
    ),
    "sw": (
        "swahili",
        "Jibu swali lililo hapa chini kwa kutumia habari zilizo katika kifungu.",
        *("Kifungu:", "Swali:", "Jibu:"),
    ),
    "te": (
        "telugu",
        "ఈ క్రింది ప్రశ్నకు గద్యభాగంలోని సమాచారం ఆధారంగా సమాధానం ఇవ్వండి.",
        *("గద్యభాగం:", "ప్రశ్న:", "సమాధానం:"),
    ),
}


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _splits(name: str, data_dir: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows of a language; no training rows if there is no file of them."""
    if data_dir is None:
        from datasets import load_dataset

        hub = load_dataset("google-research-datasets/tydiqa", "secondary_task")
        train, validation = (
            [dict(row) for row in hub[split] if row["id"].startswith(f"{name}-")]
            for split in ("train", "validation")
        )
        return train, validation
    folder = Path(data_dir) / "tydiqa"
    asked, examples = folder / f"{name}_validation.jsonl", folder / f"{name}_train.jsonl"
    if not asked.is_file():
        raise ValueError(f"--data_dir: {folder} has no {asked.name}")
    return _read(examples) if examples.is_file() else [], _read(asked)


def load(language: str, data_dir: str | None = None, **_: Any) -> Any:
    """The data set of one language: one training example, at most 200 questions, both drawn once.

    Without a training file the example is the first validation row, which is then not asked; the
    data set's ``held_out`` says so.
    """
    from datasets import Dataset, DatasetDict

    name = PROMPTS[language][0]
    train, validation = _splits(name, data_dir)
    if train:
        example = Random(SEED).choice(train)
    else:
        example, *validation = validation
    if len(validation) > QUESTIONS:
        chosen = sorted(Random(SEED).sample(range(len(validation)), QUESTIONS))
        validation = [validation[i] for i in chosen]
    rows = {"train": [example], "validation": validation}
    data: Any = DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {
                        "id": row["id"],
                        "language": language,
                        "instruction": PROMPTS[language][1],
                        "context": row["context"],
                        "question": row["question"],
                        "answers": list(row["answers"]["text"]),
                    }
                    for row in table
                ]
            )
            for split, table in rows.items()
        }
    )
    data.held_out = not train
    return data


def ask(doc: dict[str, Any]) -> str:
    """Passage and question, up to where the answer belongs."""
    _, _, passage, question, answer = PROMPTS[doc["language"]]
    return f"{passage} {doc['context']}\n{question} {doc['question']}\n{answer}"


def words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no English articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD's script has it."""
    got, want = words(prediction), words(answer)
    common = sum((Counter(got) & Counter(want)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(want)
    return 2 * precision * recall / (precision + recall)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Best F1 and exact match over the accepted answers."""
    reply = results[0].strip()
    return {
        "f1": max(f1(reply, answer) for answer in doc["answers"]),
        "exact_match": float(any(words(reply) == words(answer) for answer in doc["answers"])),
    }
