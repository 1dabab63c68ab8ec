"""Does XTF's task relevance find what does not belong to a domain? On three made-up ones.

    python scripts/xtf_domains.py --base meta-llama/Llama-3.2-3B
    python scripts/xtf_domains.py --base MODEL --pool FILE.jsonl --experts maths

Word problems with steps and ``#### n``, tasks with a Python function, and medical questions, drawn
from templates; about half of the responses hold one or two sentences of everyday talk, whose place
is known. Each domain is scored with the shipped list of its expert words and cleaned by `xtf_paper`
and `xtf_code`; the tables say what fell to which attribute, and how much of what does not belong
there fell to task relevance against how much of the rest. Conversations of your own (``--pool``)
have no known place, so only the first table is made of them.

The base must know the language: on one that does not, embeddings mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from tokenclean import cli
from tokenclean.cleaning.apply import reasons_table
from tokenclean.data.cleaned import DATA, KIND
from tokenclean.publish import read_manifest
from tokenclean.scoring.table import ScoreTable
from tokenclean.selection.xtf import NOVELTY, REASONING, RELEVANCE

RULES: Final = ("xtf_paper", "xtf_code")
REPORT: Final = "domains.md"
COLUMNS: Final = ("attention", "relevance", "relevance_hidden")

NAMES: Final = ("Anna", "Ben", "Clara", "David", "Eva", "Felix", "Greta", "Hugo", "Ida", "Jonas")
TOWNS: Final = ("Porto", "Bergen", "Lyon", "Graz", "Krakow", "Bath", "Siena", "Ghent")
#: Everyday talk, with no expert word of any of the three domains.
STRAY: Final = (
    "The train to {town} left late because of the snow.",
    "{name} sang an old song at the harbour in {town}.",
    "The bakery on the corner sells warm bread every morning.",
    "{name} painted the garden gate green last summer.",
    "The football match in {town} ended in heavy rain.",
    "{name} and {other} went dancing after the wedding.",
    "A brown dog slept under the kitchen window.",
    "The museum in {town} shows paintings of ships and storms.",
    "{name} planted roses next to the old church.",
    "The ferry was full of tourists with colourful umbrellas.",
    "{name} baked a cherry cake for the neighbours.",
    "In {town} the market opens before sunrise.",
)

#: A question and the pieces of its answer, with what lies between two pieces.
Sample = tuple[str, list[str], str]


def maths(rng: Random) -> Sample:
    """A word problem, its steps, and the answer as GSM8K writes it."""
    a, b, c = rng.randint(12, 40), rng.randint(3, 9), rng.randint(2, 6)
    name = rng.choice(NAMES)
    thing = rng.choice(("apples", "stickers", "marbles", "pencils", "coins", "stamps"))
    match rng.randrange(5):
        case 0:
            question = (
                f"{name} has {a} {thing} and gets {b} more every day for {c} days. How many "
                f"{thing} does {name} have then?"
            )
            steps = [
                f"In {c} days {name} gets {b} * {c} = <<{b}*{c}={b * c}>>{b * c} {thing}.",
                f"With those at the start the sum is {a} + {b * c} = "
                f"<<{a}+{b * c}={a + b * c}>>{a + b * c} {thing}.",
                f"#### {a + b * c}",
            ]
        case 1:
            question = (
                f"{name} packs {a} boxes with {b} {thing} each and gives {c} boxes away. How many "
                f"{thing} are left?"
            )
            steps = [
                f"There are {a} - {c} = <<{a}-{c}={a - c}>>{a - c} boxes left.",
                f"Multiply by the number in each box: {a - c} * {b} = "
                f"<<{a - c}*{b}={(a - c) * b}>>{(a - c) * b} {thing}.",
                f"#### {(a - c) * b}",
            ]
        case 2:
            question = (
                f"A field is {a} metres long and {b} metres wide. A fence costs {c} dollars per "
                "metre. What does the whole fence cost?"
            )
            around = 2 * (a + b)
            steps = [
                f"The perimeter of the rectangle is 2 * ({a} + {b}) = "
                f"<<2*({a}+{b})={around}>>{around} metres.",
                f"The fence costs {around} * {c} = <<{around}*{c}={around * c}>>{around * c} "
                "dollars.",
                f"#### {around * c}",
            ]
        case 3:
            question = (
                f"{name} cuts a rope of {a * b} metres into {a} equal pieces. How long are {c} of "
                "them together?"
            )
            steps = [
                f"Divide the length by the number of pieces: {a * b} / {a} = "
                f"<<{a * b}/{a}={b}>>{b} metres.",
                f"The total length of {c} pieces is {b} * {c} = <<{b}*{c}={b * c}>>{b * c} metres.",
                f"#### {b * c}",
            ]
        case _:
            question = (
                f"{name} drives at a speed of {a} kilometres per hour for {b} hours and rests {c} "
                "times for an hour. What is the average speed of the whole trip, without decimals?"
            )
            hours = b + c
            steps = [
                f"The distance is {a} * {b} = <<{a}*{b}={a * b}>>{a * b} kilometres.",
                f"The trip takes {b} + {c} = <<{b}+{c}={hours}>>{hours} hours.",
                f"The average is {a * b} / {hours}, which rounds down to {a * b // hours}.",
                f"#### {a * b // hours}",
            ]
    return question, steps, "\n"


def code(rng: Random) -> Sample:
    """A task and a Python function with a sentence on either side."""
    f = rng.choice(("solve", "compute", "process", "run_task", "check"))
    x = rng.choice(("values", "items", "numbers", "data"))
    k = rng.randint(2, 9)
    tasks: tuple[tuple[str, str, str, str], ...] = (
        (
            f"returns the sum of all elements of a list that {k} divides",
            f"def {f}({x}):\n    total = 0\n    for value in {x}:\n"
            f"        if value % {k} == 0:\n            total += value\n    return total",
            "The loop visits every element and adds it to the counter if the condition is true.",
            f"{f}([{k}, {k + 1}, {2 * k}]) returns {3 * k}",
        ),
        (
            "counts how often every key occurs in a list",
            f"def {f}({x}):\n    counts = {{}}\n    for key in {x}:\n"
            "        counts[key] = counts.get(key, 0) + 1\n    return counts",
            "The dictionary stores an integer for every key.",
            f"{f}(['a', 'b', 'a']) returns {{'a': 2, 'b': 1}}",
        ),
        (
            "reverses a string without the built-in function",
            f"def {f}(text):\n    result = ''\n    for character in text:\n"
            "        result = character + result\n    return result",
            "The loop puts every character in front of the string.",
            f"{f}('abc') returns 'cba'",
        ),
        (
            f"returns the first {k} elements of a sorted list",
            f"def {f}({x}):\n    ordered = sorted({x})\n    return ordered[:{k}]",
            "The slice of a list never raises an exception, even if the index is out of range.",
            f"{f}([]) returns []",
        ),
        (
            "computes the factorial of an integer by recursion",
            f"def {f}(n):\n    if n < 2:\n        return 1\n    return n * {f}(n - 1)",
            "The recursion ends when the argument is smaller than two.",
            f"{f}({k % 5 + 1}) calls itself {k % 5} times",
        ),
        (
            f"reads a file and counts its lines longer than {10 * k} characters",
            f"def {f}(path):\n    with open(path) as file:\n"
            f"        return sum(len(line) > {10 * k} for line in file)",
            "The generator reads one line at a time, so memory does not grow with the file.",
            f"{f}('empty.txt') returns 0",
        ),
    )
    task, function, remark, example = rng.choice(tasks)
    question = f"Write a Python function `{f}` that {task}."
    return question, [f"```python\n{function}\n```", remark, f"For example, {example}."], "\n"


CONDITIONS: Final = (
    ("iron deficiency anaemia", "tiredness", "pale skin", "a blood test", "iron tablets"),
    ("asthma", "wheezing", "a tight chest", "a breathing test", "an inhaler"),
    ("pneumonia", "fever", "chest pain", "an X-ray of the lungs", "an antibiotic"),
    ("migraine", "a throbbing headache", "nausea", "the history of the patient", "pain relief"),
    ("hypertension", "dizziness", "blurred vision", "blood pressure readings", "a change of diet"),
    ("diabetes", "thirst", "frequent urine", "the glucose level in the blood", "insulin"),
    ("an underactive thyroid", "weight gain", "dry skin", "a hormone test", "thyroid hormone"),
    ("influenza", "fever", "aching muscles", "a swab of the nose", "rest and fluids"),
    ("arthritis", "swelling of the joints", "stiffness", "a scan of the joint", "physiotherapy"),
    ("a kidney infection", "back pain", "vomiting", "a urine sample", "an antibiotic"),
)  # fmt: skip


def medicine(rng: Random) -> Sample:
    """A question about a condition and a short answer."""
    condition, one, other, test, cure = rng.choice(CONDITIONS)
    weeks = rng.randint(2, 8)
    question = rng.choice(
        (
            f"What are the symptoms of {condition}, and how is it treated?",
            f"How does a physician recognise {condition}?",
            f"My mother was told that she has {condition}. What should we know?",
        )
    )
    pieces = [
        f"Typical symptoms of {condition} are {one} and {other}.",
        f"The diagnosis is confirmed by {test}.",
        f"The usual treatment is {cure}, and most patients recover within {weeks} weeks.",
        "If the symptoms get worse, the patient should see a specialist at once.",
    ]
    return question, pieces, " "


#: Domain, which is also the name of its list of expert words -> what draws a sample of it.
DOMAINS: Final[dict[str, Callable[[Random], Sample]]] = {
    "maths": maths,
    "code": code,
    "medicine": medicine,
}


def rows(domain: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of a domain; `truth` spans, label 0, mark what does not belong to it."""
    found = []
    for number in range(samples):
        rng = Random(f"{seed}/{domain}/{number}")
        question, pieces, between = DOMAINS[domain](rng)
        stray = [False] * len(pieces)
        for _ in range(rng.choice((0, 0, 1, 2))):
            name, other = rng.sample(NAMES, 2)
            sentence = rng.choice(STRAY).format(town=rng.choice(TOWNS), name=name, other=other)
            # the last piece is the answer itself in two of the domains, and stays last
            place = rng.randrange(len(pieces))
            pieces.insert(place, sentence)
            stray.insert(place, True)
        text, spans = "", []
        for piece, is_stray in zip(pieces, stray, strict=True):
            text += between if text else ""
            if is_stray:
                spans.append([1, len(text), len(text) + len(piece), 0])
            text += piece
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]
        found.append(
            {"id": f"{domain}-{number}", "source": domain, "messages": messages, "truth": spans}
        )
    return found


def clean(
    pool: Path, base: str, experts: str, out: Path, options: Sequence[str]
) -> tuple[ScoreTable, list[Path]]:
    """Score a pool under the base with XTF's columns and clean it.

    Returns:
        The score table, and one cleaned pool per rule.
    """
    scores = out / f"scores_{pool.stem}"
    words = ["--model.base.name", base, "--model.columns", json.dumps(COLUMNS)]
    words += ["--model.attributes.experts", experts, "--data.path", str(pool)]
    place = ["--outputs", str(out), "--name"]
    cli.main(["score", *words, *options, *place, scores.name])
    made = []
    for rule in RULES:
        name = f"{rule}_{pool.stem}"
        cli.main(["select", "--base", str(scores), "--selection.rule", rule, *place, name])
        made.append(out / name / "cleaned")
    return ScoreTable(scores / "scores"), made


def response_column(folder: Path, name: str) -> np.ndarray:
    """A column of a cleaned pool at its response tokens, in pool order."""
    table = pq.read_table(folder / DATA, columns=[name, "response_mask"])
    values, response = (
        table.column(column).combine_chunks().values.to_numpy(zero_copy_only=False)
        for column in (name, "response_mask")
    )
    found: np.ndarray = values[response.astype(bool)]
    return found


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive token's value is above another's; ties count half."""
    _, rank, size = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(size) - (size - 1) / 2  # mean of the ranks of equal values
    n = int(positive.sum())
    above = float(middle[rank[positive]].sum()) - n * (n + 1) / 2
    return above / (n * (len(values) - n))


def separation(scores: ScoreTable, folder: Path) -> str:
    """Whether task relevance ranks tokens of the domain above the others at all."""
    inside = response_column(folder, "truth") == 1
    rows = np.arange(len(scores))
    found = (
        f"{auroc(scores.of_rows(rows, name)[1], inside):.3f} ({name})"
        for name in ("relevance", "relevance_hidden")
    )
    return f"AUROC of task relevance, in the domain against off it: {', '.join(found)}"


def off_domain_table(folder: Path) -> tuple[list[str], dict[str, dict[str, float]]]:
    """What is in the domain and what is not, against the attributes that dropped it.

    Returns:
        Lines of a Markdown table, and its numbers: row -> column -> value. Shares in percent.
    """
    truth = response_column(folder, "truth")
    failed = np.clip(response_column(folder, "reason") - 4, 0, 7)
    attributes = {"reasoning": REASONING, "novelty": NOVELTY, "relevance": RELEVANCE}
    numbers = {}
    for name, at in (("in the domain", truth == 1), ("off the domain", truth != 1)):
        own = failed[at]
        shares = {k: 100 * float((own & bit > 0).mean()) for k, bit in attributes.items()}
        only = 100 * float((own == RELEVANCE).mean())
        numbers[name] = {
            "tokens": len(own), **shares, "relevance alone": only,
            "dropped": 100 * float((own > 0).mean()),
        }  # fmt: skip
    columns = list(numbers["in the domain"])
    lines = [f"| tokens are | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, values in numbers.items():
        cells = [f"{values['tokens']:,}", *(f"{values[c]:.1f} %" for c in columns[1:])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, numbers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="folder or hub name of the base model")
    parser.add_argument("--pool", type=Path, help="conversations of your own, JSONL")
    parser.add_argument("--experts", help="of --pool: a shipped list or a file of words")
    parser.add_argument("--samples", type=int, default=120, help="per domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/xtf_domains"))
    parser.add_argument("options", nargs="*", help="of `tokenclean score`, after --")
    args = parser.parse_args(argv)
    if (args.pool is None) != (args.experts is None):
        parser.error("--pool and --experts go together: a domain's words belong to its pool")
    args.out.mkdir(parents=True, exist_ok=True)
    pools = {}
    if args.pool is not None:
        pools[args.experts] = args.pool
    else:
        for domain in DOMAINS:
            pools[domain] = args.out / f"{domain}.jsonl"
            drawn = rows(domain, args.samples, args.seed)
            pools[domain].write_text("".join(json.dumps(row) + "\n" for row in drawn), "utf-8")
    lines = []
    for experts, pool in pools.items():
        scores, made = clean(pool, args.base, experts, args.out, args.options)
        for folder in made:
            manifest = read_manifest(folder, KIND)
            lines += [f"## {pool.stem}: {manifest['selection']['rule']}", ""]
            lines += [reasons_table(manifest), ""]
            if args.pool is None:
                lines += [*off_domain_table(folder)[0], ""]
        if args.pool is None:
            lines += [separation(scores, made[0]), ""]
    text = "\n".join(lines)
    (args.out / REPORT).write_text(text, "utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
