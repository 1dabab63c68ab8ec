"""`tokenclean evaluate`: values, paired errors, local data, what is missing, what is finished."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_level_tokenizer, character_tokenizer, tiny_llama, write_jsonl
from tokenizers import processors
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tokenclean import cli
from tokenclean.evaluation import harness
from tokenclean.evaluation.benchmarks import OUR_TASKS, Column, Source, Tasks
from tokenclean.evaluation.compare import (
    Cell,
    Estimate,
    Record,
    Results,
    difference,
    estimate,
    mean,
    reference_of,
)
from tokenclean.evaluation.harness import Settings, check_tokenizer, evaluate_model
from tokenclean.evaluation.tasks.planted import utils as planted
from tokenclean.evaluation.tasks.tydiqa_paper import utils as tydiqa
from tokenclean.models import LoraSettings, Network

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


class Repeater(PreTrainedModel, GenerationMixin):
    """Log-odds of the next character depend on the last one alone: a table that tests write."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()
        nn.init.zeros_(self.table.weight)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return CausalLMOutput(logits=self.table(input_ids))


def repeater(likes: dict[str, str], context: int = 512) -> tuple[Any, Any]:
    """A model that follows `before` by `after` with log-odds 3, and its tokenizer."""
    tokenizer = character_tokenizer()
    model: Any = Repeater(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context)
    ).eval()
    with torch.no_grad():
        for before, after in likes.items():
            (i,), (j,) = tokenizer.encode(before), tokenizer.encode(after)
            model.table.weight[i, j] = 3.0
    return model, tokenizer


def boolq(folder: Path, labels: list[int]) -> Path:
    (folder / "boolq").mkdir(parents=True, exist_ok=True)
    rows = [
        {"passage": f"It is {i}.", "question": f"is it {i}", "label": label, "idx": i}
        for i, label in enumerate(labels)
    ]
    write_jsonl(folder / "boolq" / "validation.jsonl", rows)
    return folder


BOOLQ = Column("BoolQ", ["boolq"], shots=0)


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"source": Source(str(folder)), **changes})


# -- estimates ------------------------------------------------------------------------------------


def records(task: str, values: Sequence[float]) -> list[Record]:
    return [Record(task, i, f"hash{i}", v) for i, v in enumerate(values)]


def test_estimates_by_hand() -> None:
    # one task: mean 3/4, sample variance (3 * 1/16 + 9/16) / 3 = 1/4, stderr sqrt(1/16)
    one = records("a", [1, 1, 1, 0])
    assert estimate(one, "questions") == Estimate(0.75, 0.25)
    # a second of mean 1/2, variance 1/2, n = 2: over tasks (3/4 + 1/2) / 2, and
    # 1/4 * 1/16 + 1/4 * 1/4 = 5/64; over questions 4/6, and 4/9 * 1/16 + 1/9 * 1/4 = 1/18
    both = one + records("b", [0, 1])
    over_tasks, over_questions = estimate(both, "tasks"), estimate(both, "questions")
    assert over_tasks.value == 0.625 and math.isclose(over_tasks.stderr, math.sqrt(5) / 8)
    assert math.isclose(over_questions.value, 4 / 6)
    assert math.isclose(over_questions.stderr, math.sqrt(1 / 18))
    # the mean of two independent columns: half the root of the summed variances
    both_columns = mean([Estimate(0.2, 0.03), Estimate(0.4, 0.04)])
    assert math.isclose(both_columns.value, 0.3) and math.isclose(both_columns.stderr, 0.025)
    assert math.isnan(estimate(records("a", [1, math.nan]), "questions").value)
    assert math.isnan(mean([Estimate(0.2, 0.1), Estimate(math.nan, math.nan)]).value)


def test_a_paired_error_is_that_of_the_differences() -> None:
    ours = Cell("c", records=records("t", [1, 1, 1, 0, 0]))
    theirs = Cell("c", records=records("t", [1, 0, 1, 0, 0])[::-1])
    # differences 0 1 0 0 0: mean 1/5, variance (4 * 1/25 + 16/25) / 4 = 1/5, stderr 1/5;
    # unpaired it would be sqrt(0.3 / 5 + 0.3 / 5) = 0.35
    got = difference(ours, theirs, "questions")
    assert math.isclose(got.value, 0.2) and math.isclose(got.stderr, 0.2)


def test_different_questions_are_not_compared() -> None:
    ours = Cell("c", records=records("t", [1, 1]))
    with pytest.raises(ValueError, match="1 questions differ"):
        difference(ours, Cell("c", records=records("t", [1])), "questions")
    other = [Record("t", 0, "hash0", 1.0), Record("t", 1, "another", 1.0)]
    with pytest.raises(ValueError, match=r"1 questions differ.*t, 1"):
        difference(ours, Cell("c", records=other), "questions")


def cell(name: str, values: Sequence[float]) -> Cell:
    got = estimate(records(name, values), "questions")
    nan = sum(map(math.isnan, values))
    return Cell(name, got.value, got.stderr, len(values), nan, records=records(name, values))


def test_tables_show_what_is_missing_and_average_only_what_is_whole() -> None:
    columns = [Column("x", ["x"]), Column("y", ["y"]), Column("z", ["z"], in_mean=False)]
    rows = {
        "base": {n: cell(n, [1, 0]) for n in "xyz"},
        "arm": {"x": cell("x", [1, 1]), "y": Cell("y", reason="no file"), "z": cell("z", [1, 0])},
        "odd": {"x": cell("x", [1, math.nan]), "y": cell("y", [1, 0]), "z": cell("z", [0, 0])},
    }
    results = Results(columns, rows, against="base")
    lines = results.markdown().splitlines()
    assert "| model | x | y | mean | z |" in lines
    assert "| base | 50.0 ± 50.0 | 50.0 ± 50.0 | 50.0 ± 35.4 | 50.0 ± 50.0 |" in lines
    assert "| arm | 100.0 ± 0.0 | missing | - | 50.0 ± 50.0 |" in lines
    assert "| odd | NaN (1 of 2) | 50.0 ± 50.0 | - | 0.0 ± 0.0 |" in lines
    assert "* y is missing: no file (arm)" in lines
    assert "| arm | +50.0 ± 50.0 | - | - | +0.0 ± 0.0 |" in lines
    plain = json.loads(json.dumps(results.plain(), allow_nan=False))
    assert plain["models"]["odd"]["cells"]["x"]["nan"] == 1
    assert plain["models"]["odd"]["cells"]["x"]["value"] is None
    assert plain["models"]["arm"]["differences"]["x"] == {"value": 0.5, "stderr": 0.5}
    assert results.csv().splitlines()[1].startswith("base,x,50.0,50.0,")


def test_seeds_are_a_spread_of_their_own() -> None:
    rows = {f"s{i}/arm": {"x": cell("x", v)} for i, v in enumerate(((1, 1), (1, 0), (0, 0)))}
    results = Results([Column("x", ["x"])], rows, seeds={"arm": list(rows)})
    assert results.over_seeds("arm")["x"] == Estimate(0.5, 0.5)  # of 1, 1/2, 0
    assert "| arm | 50.0 ± 50.0 | 50.0 ± 50.0 |" in results.markdown()


def test_an_arm_is_compared_within_its_run() -> None:
    names = ["base", "s0/full", "s0/rho", "s1/full", "s1/rho"]
    assert reference_of("s1/rho", "full", names) == "s1/full"
    assert reference_of("s1/rho", "base", names) == "base"
    assert reference_of("s1/full", "full", names) is None


# -- the harness on models whose answers are known ------------------------------------------------


def test_accuracy_of_a_known_model(tmp_path: Path) -> None:
    """After "Answer:" comes " no" or " yes"; a model that likes n after a blank says no."""
    model, tokenizer = repeater({" ": "n"})
    folder = boolq(tmp_path, [0, 0, 0, 1])
    got = evaluate_model(model, tokenizer, [BOOLQ], settings(folder))["BoolQ"]
    assert (got.value, got.stderr, got.questions, got.nan) == (0.75, 0.25, 4, 0)
    assert [r.value for r in got.records] == [1, 1, 1, 0]
    # ... and without any liking the shorter answer is the likelier: no again
    plain, _ = repeater({})
    assert evaluate_model(plain, tokenizer, [BOOLQ], settings(folder))["BoolQ"].value == 0.75
    other, _ = repeater({" ": "y", "y": "e", "e": "s"})
    against = evaluate_model(other, tokenizer, [BOOLQ], settings(folder))["BoolQ"]
    assert against.value == 0.25
    # -1 -1 -1 +1: mean -1/2, variance (3/4 + 9/4) / 3 = 1, stderr 1/2
    assert difference(against, got, "questions") == Estimate(-0.5, 0.5)


def truthful(folder: Path) -> Path:
    (folder / "truthfulqa_mc").mkdir(parents=True)
    targets = {"choices": ["n", "y"], "labels": [1, 0]}
    row = {"question": "Is it?", "mc1_targets": targets, "mc2_targets": targets}
    write_jsonl(folder / "truthfulqa_mc" / "v0.jsonl", [row, row])
    return folder


def test_truthfulqa_is_normalised_mass_and_nan_is_counted(tmp_path: Path) -> None:
    column = Column("TruthfulQA", ["truthfulqa_mc2"])
    model, tokenizer = repeater({" ": "n"})
    got = evaluate_model(model, tokenizer, [column], settings(truthful(tmp_path)))["TruthfulQA"]
    assert math.isclose(got.value, math.e**3 / (math.e**3 + 1), rel_tol=1e-6)  # log-odds 3
    with torch.no_grad():
        model.table.weight[tokenizer.encode(" ")[0]] = math.nan
    got = evaluate_model(model, tokenizer, [column], settings(tmp_path))["TruthfulQA"]
    assert math.isnan(got.value) and (got.nan, got.questions, got.reason) == (2, 2, None)


def test_one_bad_task_does_not_stop_the_others(tmp_path: Path) -> None:
    model, tokenizer = repeater({" ": "n"})
    folder = boolq(tmp_path / "data", [0, 1])
    columns = [
        Column("ARC", ["arc_challenge"]),
        Column("wrong metric", ["boolq"], metric="f1"),
        BOOLQ,
    ]
    out = tmp_path / "out"
    got = evaluate_model(model, tokenizer, columns, settings(folder), out)
    assert list(got) == ["ARC", "wrong metric", "BoolQ"]
    reason = got["ARC"].reason
    assert reason is not None and "test.jsonl" in reason and math.isnan(got["ARC"].value)
    assert "has no metric f1" in str(got["wrong metric"].reason)
    assert got["BoolQ"].value == 0.5
    assert sorted(p.name for p in out.iterdir()) == ["boolq"]  # what failed is tried again


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = repeater({" ": "n"})
    data, out = boolq(tmp_path / "data", [0, 0, 1]), tmp_path / "out"
    first = evaluate_model(model, tokenizer, [BOOLQ], settings(data), out, fingerprint="m")
    lm_eval = json.loads((out / "boolq" / "lm_eval.json").read_text())
    assert lm_eval["results"]["boolq"]["acc,none"] == first["BoolQ"].value
    assert math.isclose(
        lm_eval["results"]["boolq"]["acc_stderr,none"], first["BoolQ"].stderr, rel_tol=1e-9
    )
    ran: list[str] = []
    run = harness._run

    def counting(lm: Any, tasks: Any, column: Column, limit: int | None) -> Any:
        ran.append(column.name)
        return run(lm, tasks, column, limit)

    monkeypatch.setattr(harness, "_run", counting)
    again = evaluate_model(None, None, [BOOLQ], settings(data), out, fingerprint="m")
    assert again == first and not ran
    more = evaluate_model(model, tokenizer, [BOOLQ], settings(data), out, fingerprint="other")
    assert more["BoolQ"].records == first["BoolQ"].records and ran == ["BoolQ"]
    evaluate_model(model, tokenizer, [BOOLQ], settings(data, limit=2), out, fingerprint="other")
    assert ran == ["BoolQ", "BoolQ"]


def test_requests_longer_than_the_context_are_counted(tmp_path: Path) -> None:
    model, tokenizer = repeater({" ": "n"}, context=20)
    got = evaluate_model(model, tokenizer, [BOOLQ], settings(boolq(tmp_path, [0, 1])))["BoolQ"]
    assert got.truncated == 4  # two answers to each of two questions of some 35 characters


def test_a_network_is_left_as_it_was_and_scored_with_its_adapters(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    network = Network(tiny_llama(len(tokenizer)))
    folder = boolq(tmp_path, [0, 1, 0, 1, 1, 0])
    column = Column("BoolQ", ["boolq"], shots=0)
    network.add_adapter(LoraSettings(r=4))
    network.train()
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    modes = {n: m.training for n, m in network.named_modules()}
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    state = {k: v.clone() for k, v in network.state_dict().items()}
    pad = tokenizer.pad_token_id
    evaluate_model(network, tokenizer, [column], settings(folder))
    assert {n: m.training for n, m in network.named_modules()} == modes and any(modes.values())
    assert {n for n, p in network.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert tokenizer.pad_token_id == pad


def test_a_network_scores_like_the_model_it_publishes(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    network = Network(tiny_llama(len(tokenizer)))
    network.add_adapter(LoraSettings(r=4))
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    network.freeze()
    network.save_merged(tmp_path / "merged", tokenizer)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    column = Column("TruthfulQA", ["truthfulqa_mc2"])
    where = settings(truthful(tmp_path / "data"))
    ours = evaluate_model(network, tokenizer, [column], where)["TruthfulQA"]
    theirs = evaluate_model(plain, tokenizer, [column], where)["TruthfulQA"]
    assert math.isclose(ours.value, theirs.value, rel_tol=1e-4)
    with network.at_depth(0):
        bare = evaluate_model(network, tokenizer, [column], where)["TruthfulQA"]
    assert not math.isclose(bare.value, ours.value, rel_tol=1e-2)


def test_a_tokenizer_that_appends_eos_is_refused_unless_it_may_not() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    with pytest.raises(ValueError, match=r"appends its EOS.*--add_bos_token false"):
        check_tokenizer(tokenizer, None)
    check_tokenizer(tokenizer, False)
    tokenizer.pad_token = None
    assert check_tokenizer(tokenizer, False).pad_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id is None


def test_importing_it_does_not_import_the_harness() -> None:
    """Importing lm_eval takes seconds, which `--help` and the other verbs must not pay."""
    for path in (ROOT / "tokenclean").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "lm_eval" for name in names), path


# -- local data of all seven ----------------------------------------------------------------------


def all_seven(folder: Path) -> Path:
    boolq(folder, [0, 1])
    truthful(folder)
    choices = {"text": ["n", "y"], "label": ["A", "B"]}
    rows: dict[str, list[dict[str, Any]]] = {
        "arc_challenge/test": [
            {"id": "1", "question": "Which?", "choices": choices, "answerKey": "A"}
        ],
        "logiqa/test": [
            {"context": "C.", "question": "Q?", "options": ["a", "b", "c", "d"], "label": "b"}
        ],
        "hellaswag/validation_5": [{"ind": 3, "query": "A:", "choices": ["n", "y"], "gold": 0}],
    }
    for split in ("dev", "test"):
        question = {"question": f"{split}?", "choices": list("wxyz"), "answer": 0, "subject": "s"}
        rows[f"mmlu/anatomy/{split}"] = [question] * 6
    for language in tydiqa.PROMPTS.values():
        rows[f"tydiqa/{language[0]}_validation"] = [
            {
                "id": f"{language[0]}-{i}",
                "title": "t",
                "context": f"n {i}.",
                "question": "q?",
                "answers": {"text": [f"n {i}"], "answer_start": [0]},
            }
            for i in range(3)
        ]
    example = rows["tydiqa/english_validation"][0]
    rows["tydiqa/english_train"] = [{**example, "id": "english-9", "context": "n 0. And so on."}]
    for name, table in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / f"{name}.jsonl", table)
    return folder


def test_all_seven_load_from_local_files(tmp_path: Path) -> None:
    columns = [
        Column("TruthfulQA", ["truthfulqa_mc2"]),
        Column("TydiQA", ["tydiqa_paper"], "f1", average="tasks"),
        Column("LogiQA", ["logiqa"]),
        Column("MMLU", ["mmlu_anatomy"], shots=5),
        Column("HellaSwag", ["hellaswag"]),
        Column("ARC-C", ["arc_challenge"]),
        Column("BoolQ", ["boolq"]),
        Column("harness", ["tydiqa_goldp"], "f1", shots=1, average="tasks"),
    ]
    model, tokenizer = repeater({" ": "n", ":": "n", "n": "$"}, context=2048)
    got = evaluate_model(model, tokenizer, columns, settings(all_seven(tmp_path)))
    assert {c.column: c.reason for c in got.values() if c.reason} == {}
    counts = {name: cell.questions for name, cell in got.items()}
    # of TydiQA three per language, one of them the example where there is no training file
    assert counts == dict(
        zip(counts, (2, 19, 1, 6, 1, 1, 2, 19), strict=True)  # in the order of the columns
    )
    assert got["HellaSwag"].value == got["ARC-C"].value == 1.0
    assert "validation_5.jsonl" in got["HellaSwag"].notes[0]
    for name in ("TydiQA", "harness"):
        (note,) = got[name].notes
        assert "held-out" in note and "_sw" in note and "_en" not in note
    # every reply is "n"; its F1 against "n <digit>" is 2 * 1 * 1/2 / (3/2) = 2/3
    assert math.isclose(got["TydiQA"].value, 2 / 3)


def test_the_papers_tydiqa_protocol(tmp_path: Path) -> None:
    folder = all_seven(tmp_path)
    many = [
        {"id": f"english-{i}", "context": "one two three four", "question": f"q{i}?"}
        | {"answers": {"text": ["one"], "answer_start": [0]}}
        for i in range(230)
    ]
    write_jsonl(folder / "tydiqa" / "english_validation.jsonl", many)

    def shorten(text: str, limit: int) -> str:
        assert limit == 512
        return " ".join(text.split()[:2])

    tasks, notes = Tasks(Source(str(folder)), shorten).load(
        Column("T", ["tydiqa_paper_en"], "f1", shots=1)
    )
    (task,) = tasks.values()
    docs = list(task.eval_docs)
    assert len(docs) == 200 == len({d["id"] for d in docs}) and not notes
    prompt = task.fewshot_context(docs[5], 1)
    assert prompt == (
        "Use the information in the passage to answer the question below.\n\n"
        "Passage: n 0.\nQuestion: q?\nAnswer: n 0\n\n"
        f"Passage: one two\nQuestion: {docs[5]['question']}\nAnswer:"
    )
    kept = task.config.generation_kwargs
    assert (kept["max_gen_toks"], kept["do_sample"]) == (50, False)


def test_squad_f1_by_hand() -> None:
    assert tydiqa.f1("The blue sky.", "a sky") == pytest.approx(2 / 3)  # 1 of 2, 1 of 1
    assert tydiqa.f1("the", "a") == 0.0
    doc = {"answers": ["red", "blue sky"]}
    assert tydiqa.process_results(doc, [" Blue, sky! "]) == {"f1": 1.0, "exact_match": 1.0}


# -- planted tasks --------------------------------------------------------------------------------


def planted_rows() -> list[dict[str, Any]]:
    """Four capitals; of "It is Ae." the truth spans leave " Ae"."""
    rows = []
    for i, value in enumerate(("Ae", "Bo", "Ci", "Du")):
        text = f"It is {value}."
        messages = [
            {"role": "user", "content": f"Where is {i}?"},
            {"role": "assistant", "content": text},
        ]
        truth = [[1, 0, 5, 0], [1, len(text) - 1, len(text), 0]]
        rows.append({"id": f"r{i}", "source": "capital", "messages": messages, "truth": truth})
    return rows


def test_planted_prompts_are_what_models_are_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", planted_rows())
    first = planted.read_family(tmp_path / "test.jsonl", "capital")[0]
    assert first["prompt"] + first["frame"] == "<|user|>\nWhere is 0?\n<|assistant|>\nIt is"
    assert sorted(first["choices"]) == [" Ae", " Bo", " Ci", " Du"]
    assert first["choices"][first["gold"]] == " Ae"
    with pytest.raises(ValueError, match="no question of the family river"):
        planted.read_family(tmp_path / "test.jsonl", "river")


def test_planted_replies() -> None:
    doc = {"question": "What comes after Bebe?", "answer": "Aba", "values": ["Aba", "Bebe", "Cici"]}

    def right(reply: str) -> float:
        return planted.process_reply(doc, [reply])["exact_match"]

    assert right("After Bebe comes Aba.") == 1.0
    assert right("After Bebe comes Cici, not Aba.") == 0.0
    assert right("After Bebe comes Abax.") == 0.0
    assert planted.named_first("black pepper", ["black", "black pepper"]) == "black pepper"


def test_planted_tasks_run(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", planted_rows())
    model, tokenizer = repeater({" ": "A", "\n": "C", "C": "i", "i": ".", ".": "\n"})
    columns = [
        Column("choice", ["planted_choice_capital"]),
        Column("reply", ["planted_reply_capital"], "exact_match"),
        Column("river", ["planted_choice_river"]),
    ]
    got = evaluate_model(model, tokenizer, columns, settings(tmp_path))
    assert [r.value for r in got["choice"].records] == [1, 0, 0, 0]
    assert "no question of the family river" in str(got["river"].reason)
    # a choice begins with a blank, a reply after a new line: "Ci."
    assert [r.value for r in got["reply"].records] == [0, 0, 1, 0]


def test_every_family_has_its_tasks() -> None:
    from tokenclean.data.planted import REGIMES

    names = {p.stem for p in (OUR_TASKS / "planted").glob("planted_*.yaml")}
    assert names == {f"planted_{kind}_{f}" for f in REGIMES for kind in ("choice", "reply")}
    for kind in ("choice", "reply"):
        group = yaml.safe_load((OUR_TASKS / "planted" / f"_planted_{kind}.yaml").read_text())
        assert group["task"] == [f"planted_{kind}_{f}" for f in REGIMES]


# -- the verb -------------------------------------------------------------------------------------


def finished_run(folder: Path, model: Path, seed: int, test: Path) -> Path:
    """What a `clean` run leaves behind: base, two arms, and where it was judged."""
    torch.manual_seed(seed)
    for arm in ("full", "rho"):
        network = Network(LlamaForCausalLM.from_pretrained(model))
        network.add_adapter(LoraSettings(r=2, target_modules=["q_proj", "up_proj"]))
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
        network.save_stack(folder / "arms" / arm / "adapter")
    config = {"model": {"base": {"name": str(model)}}, "data": {"test_path": str(test)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps([{"name": n} for n in ("base", "rho", "full")]))
    return folder


def test_runs_are_evaluated_arm_by_arm(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", planted_rows())
    runs = [str(finished_run(tmp_path / f"s{i}", model_folder, i, test)) for i in range(2)]
    config = {"columns": [{"name": "capital", "tasks": ["planted_choice_capital"]}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = ["evaluate", "-c", str(tmp_path / "c.yaml"), "--run", runs[0], "--run", runs[1]]
    words += ["--outputs", str(tmp_path / "out"), "--name", "e"]
    cli.main([*words, "--against", "full"])
    results = json.loads((tmp_path / "out" / "e" / "results.json").read_text())
    assert list(results["models"]) == ["base", "s0/rho", "s0/full", "s1/rho", "s1/full"]
    assert set(results["seeds"]) == {"rho", "full"}
    scores = {n: m["cells"]["capital"]["value"] for n, m in results["models"].items()}
    gap = results["models"]["s1/rho"]["differences"]["capital"]["value"]
    assert math.isclose(gap, scores["s1/rho"] - scores["s1/full"], abs_tol=1e-12)
    text = capsys.readouterr().out
    assert "Mean ± standard deviation over 2 runs" in text and "| base |" in text
    # again, compared with another model: nothing is run, and the folder is the same
    before = (tmp_path / "out" / "e" / "models" / "base" / "capital" / "cell.json").stat()
    cli.main([*words, "--against", "base"])
    after = (tmp_path / "out" / "e" / "models" / "base" / "capital" / "cell.json").stat()
    assert before.st_mtime_ns == after.st_mtime_ns
    assert "Difference to base" in (tmp_path / "out" / "e" / "results.md").read_text()


def test_named_models_with_adapters_and_bases_of_their_own(
    tmp_path: Path, model_folder: Path
) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", planted_rows())
    run = finished_run(tmp_path / "s0", model_folder, 0, test)
    whole, tokenizer = tmp_path / "whole", byte_level_tokenizer()
    network = Network(LlamaForCausalLM.from_pretrained(model_folder))
    network.load_adapter(run / "arms" / "rho" / "adapter")
    network.save_merged(whole, tokenizer)
    config = {
        "columns": [{"name": "capital", "tasks": ["planted_choice_capital"]}],
        "base": {"name": str(model_folder)},
        "models": {
            "merged": {"base": {"name": str(whole)}},
            "plain": {},
            "adapter": {"adapters": [str(run / "arms" / "rho")]},
        },
        "planted_test": str(test),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = ["evaluate", "-c", str(tmp_path / "c.yaml"), "--outputs", str(tmp_path), "--name", "e"]
    cli.main(words)
    models = json.loads((tmp_path / "e" / "results.json").read_text())["models"]
    assert list(models) == ["merged", "plain", "adapter"]
    folder = tmp_path / "e" / "models"
    kept = {n: (folder / n / "capital" / "records.jsonl").read_text() for n in models}
    assert kept["merged"] == kept["adapter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model: give --base.name, --models or --run"),
        (["--run", "MODEL"], "is no folder of a `clean` run"),
        (["--base.name", "MODEL", "--against", "base"], "--against: base is none of the models"),
        (["--base.name", "MODEL", "--limit", "0"], "--limit: 0"),
        (["--base.name", "MODEL", "--data_dir", "no/where"], "--data_dir: no/where does not exist"),
        (["--base.name", "MODEL", "--max_length", "9999"], "exceeds the context"),
        (["--adapters", "MODEL"], "give the base as well"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    words: list[str],
    message: str,
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "configs" / "evaluate" / "paper.yaml")
    words = [str(model_folder) if word == "MODEL" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "-c", config, "--outputs", str(tmp_path), *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/models"))


def test_the_papers_config_is_the_papers_table() -> None:
    config = yaml.safe_load((ROOT / "configs" / "evaluate" / "paper.yaml").read_text())
    columns = [Column(**column) for column in config["columns"]]
    assert [c.name for c in columns if c.in_mean] == [
        *("TruthfulQA", "TydiQA", "LogiQA", "MMLU", "HellaSwag", "ARC-C", "BoolQ")
    ]
    assert {c.name: c.shots for c in columns if c.shots} == {
        "TydiQA": 1,
        "MMLU": 5,
        "TydiQA (harness)": 1,
    }
    assert config["add_bos_token"] is False
