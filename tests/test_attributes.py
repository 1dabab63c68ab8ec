"""Columns of score tables besides the loss, against hand computation and written-out float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    byte_level_tokenizer,
    character_tokenizer,
    conversation,
    llama_nll_float64,
    sentencepiece_tokenizer,
    tiny_llama,
    write_jsonl,
)
from test_scoring import data_for, trainer_for
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from tokenclean import cli
from tokenclean.cleaning.apply import ScoredRows
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.rows import TokenRows
from tokenclean.models import BaseConfig, Network
from tokenclean.publish import MANIFEST
from tokenclean.scoring.attributes import EXPERTS, AttributeSettings
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.module import ScoringModule, score_pool
from tokenclean.scoring.table import Column, ScoreTable

EVERY: list[Column] = [
    *("gap", "alone", "attention", "attention_keys", "relevance", "relevance_hidden")
]
WORDS = ["sum", "plus", "square root"]


def score(
    model: Path,
    data: TuluDataModule,
    folder: Path,
    columns: list[Column],
    settings: AttributeSettings | None = None,
    cache: ScoreCache | None = None,
    **options: Any,
) -> ScoreTable:
    settings = settings or AttributeSettings(WORDS)
    module = ScoringModule(BaseConfig(str(model)), columns=columns, attributes=settings)
    module.load(torch.device("cpu"))
    assert module.network is not None
    data.layout = module.network.layout
    rows, trainer = data.scored_rows(), trainer_for(**options)
    score_pool(module, trainer, data, rows, folder, data.token_budget, cache)
    return ScoreTable(folder)


def of_row(table: ScoreTable, row: int, column: str) -> np.ndarray:
    counts, values = table.of_rows(np.array([row]), column)
    assert values.dtype == np.float32 and counts.tolist() == [len(values)]
    return values


def own(data: TuluDataModule, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a pool row and the positions of its response tokens."""
    ids = data.pool.input_ids[row]
    return ids, np.flatnonzero(data.pool.response_mask[row])


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("layer", [None, 0, -2, -1])
def test_attention_is_that_of_the_written_out_maps(
    model_folder: Path, pool_file: Path, tmp_path: Path, cut: bool, layer: int | None
) -> None:
    options: dict[str, Any] = {"cut_after_last_target": cut, "subsets": 4, "subset": 0}
    data = data_for(model_folder, pool_file, tmp_path / "cache", **options)
    settings = AttributeSettings(layer=layer)
    table = score(model_folder, data, tmp_path / "t", ["attention", "attention_keys"], settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    deep = {None: 1, 0: 0, -2: 0, -1: 1}[layer]  # of two layers, three quarters up is the second
    assert table.manifest["attributes"] == {"layer": deep}
    for row in table.rows:
        ids, positions = own(data, int(row))
        length = int(positions[-1]) if cut else len(ids)  # tokens that are computed
        found: dict[str, torch.Tensor] = {}
        llama_nll_float64(model, ids[:length].tolist(), found=found)
        maps = found["attention"].numpy()
        received, keys = [], []
        for p in positions:
            later = [
                maps[deep, :, i, p] / maps[deep, :, i, 1 : i + 1].sum(-1)
                for i in range(p + 1, length)
            ]
            received.append(np.mean(later) if later else np.nan)
            keys.append(maps[0, :, p].mean(0).sum() / length if p < length else np.nan)
        got = of_row(table, int(row), "attention")
        np.testing.assert_allclose(got, received, rtol=1e-4, atol=1e-6)
        # the last target and the last token before the end of what is computed
        assert np.isnan(got).sum() == (min(2, len(got)) if cut else 1)
        keys_got = of_row(table, int(row), "attention_keys")
        np.testing.assert_allclose(keys_got, keys, rtol=1e-5)
        np.testing.assert_allclose(keys_got[: -1 if cut else None], 1 / length, rtol=1e-5)


def turns(path: Path) -> Path:
    """Two conversations of several turns, one of one."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"row-{i}",
            "messages": [
                {"role": ("user", "assistant")[k % 2], "content": f"the sky {i} is {k}."}
                for k in range(2 * n)
            ],
        }
        for i, n in enumerate((3, 1, 2))
    ]
    return write_jsonl(path, rows)


@pytest.mark.parametrize("bos", [True, False])
def test_alone_is_the_loss_of_the_responses_without_their_prompts(
    tmp_path: Path, bos: bool
) -> None:
    tokenizer = byte_level_tokenizer(bos)
    tokenizer.bos_token = "<s>" if bos else None
    start = 0 if bos else 1  # <s>, </s>
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    data = data_for(tmp_path / "model", turns(tmp_path / "pool.jsonl"), tmp_path / "cache")
    table = score(tmp_path / "model", data, tmp_path / "t", ["alone"])
    assert "attributes" not in table.manifest
    for row in range(3):
        ids, positions = own(data, row)
        # all turns end to end
        want = llama_nll_float64(model, [start, *ids[positions].tolist()])
        np.testing.assert_allclose(of_row(table, row, "alone"), want, rtol=0, atol=2e-5)
        whole = llama_nll_float64(model, ids.tolist())[positions - 1]
        np.testing.assert_allclose(of_row(table, row, "nll"), whole, rtol=0, atol=2e-5)
        assert (want - whole).abs().max() > 0.1


def characters(path: Path) -> Path:
    tokenizer = character_tokenizer()
    model = tiny_llama(len(tokenizer) + 5, eos_token_id=0)  # a matrix longer than the vocabulary
    with torch.no_grad():  # an entry's embedding is its id on one axis
        weight = model.get_input_embeddings().weight
        weight.zero_()
        weight[:, 0] = torch.arange(len(weight)).float()
        weight[len(tokenizer) :, 0] = 1000.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_relevance_by_hand(tmp_path: Path) -> None:
    model = characters(tmp_path / "model")
    pool = write_jsonl(tmp_path / "pool.jsonl", [conversation("hi", "bad")])
    data = data_for(model, pool, tmp_path / "cache")
    ids = character_tokenizer().get_vocab()
    # The mean of b, d and d is at 3 + 1/3 on a scale on which a is 1.
    table = score(model, data, tmp_path / "t", ["relevance"], AttributeSettings(["bd", "d", "bd"]))
    centre = ids["a"] + 1 + 2 / 3 * 1 + 2 / 3  # a + (1 + 3 + 3) / 3
    assert centre == pytest.approx(ids["a"] + 7 / 3)
    far = max(centre - 0, max(ids.values()) - centre)  # rows beyond the vocabulary do not count
    want = [1 - abs(ids[c] - centre) / far for c in ("b", "a", "d", "$")]
    np.testing.assert_allclose(of_row(table, 0, "relevance"), want, rtol=1e-6)
    assert table.manifest["attributes"] == {"experts": ["bd", "d"]}
    assert table.manifest["columns"] == ["relevance"]


def test_spaces_before_words_are_no_words(tmp_path: Path) -> None:
    """Some tokenizers make a token of the space that stands before a word."""
    tokenizer = sentencepiece_tokenizer()
    assert len(tokenizer(" quick", add_special_tokens=False).input_ids) > len(
        tokenizer("quick", add_special_tokens=False).input_ids
    )
    model = tiny_llama(len(tokenizer), bos_token_id=1, eos_token_id=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.get_vocab()["▁"]] = 1e6
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pool = write_jsonl(tmp_path / "pool.jsonl", [conversation("sky", "the dog")])
    data = data_for(tmp_path / "model", pool, tmp_path / "cache")
    table = score(tmp_path / "model", data, tmp_path / "t", ["relevance"], AttributeSettings(["o"]))
    values = of_row(table, 0, "relevance")
    ids, positions = own(data, 0)
    blank = ids[positions] == tokenizer.get_vocab()["▁"]
    assert blank.any() and (values[blank] == 0.0).all() and (values[~blank] > 0.99).all()


def test_relevance_of_hidden_states(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=4, subset=1)
    table = score(model_folder, data, tmp_path / "t", ["relevance_hidden"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), byte_level_tokenizer()

    def last(ids: list[int]) -> torch.Tensor:
        found: dict[str, torch.Tensor] = {}
        llama_nll_float64(model, ids, found=found)
        return found["hidden"][-1]

    states = []
    for word in WORDS:
        for text in (word, " " + word):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            states.append(last([i for i in ids if tokenizer.decode([i]).strip()]))
    mean = torch.stack(states).mean(0)
    for row in table.rows[:4]:
        ids, positions = own(data, int(row))
        want = [
            float(torch.cosine_similarity(last([token]), mean, dim=0))
            for token in ids[positions].tolist()
        ]
        np.testing.assert_allclose(of_row(table, int(row), "relevance_hidden"), want, atol=2e-5)


def test_one_state_per_entry_that_occurs(
    model_folder: Path, pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of batches, a target's id is passed once, and no other id is."""
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    assert len(data.predict_dataloader()) > 5
    passed: list[int] = []
    hidden = Network.hidden

    def watch(self: Network, batch: Any, reader: Any = ()) -> Any:
        if batch.segments == [1] * len(batch.rows) and len(batch.rows) > 3:
            passed.extend(batch.input_ids.flatten().tolist())
        return hidden(self, batch, reader)

    monkeypatch.setattr(Network, "hidden", watch)
    score(model_folder, data, tmp_path / "t", ["relevance_hidden"], AttributeSettings(["fox fox"]))
    want = {int(i) for r in range(40) for i in data.pool.input_ids[r][data.pool.response_mask[r]]}
    assert passed == sorted(want)


def test_every_column_at_once_and_the_losses_stay(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=2, subset=0)
    plain = score(model_folder, data, tmp_path / "plain", [])
    both = score(model_folder, data, tmp_path / "every", EVERY[::-1])
    assert both.manifest["columns"] == EVERY  # in one order, whoever asks
    assert both.columns == [*plain.columns, *EVERY]
    rows = plain.rows
    assert plain.of_rows(rows)[1].tobytes() == both.of_rows(rows)[1].tobytes()
    for column in EVERY:
        one = score(model_folder, data, tmp_path / column, [column])
        got, want = both.of_rows(rows, column)[1], one.of_rows(rows, column)[1]
        np.testing.assert_array_equal(got, want, err_msg=column)
        assert np.isfinite(got).all() == (not column.startswith("attention"))
        with pytest.raises(ValueError, match=rf"no column `{column}`.*columns '\[{column}\]'"):
            plain.of_rows(rows, column)
    with pytest.raises(ValueError, match="no column `entropy`"):
        both.of_rows(rows, "entropy")


def test_batches_change_nothing(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=2, subset=0)
    tables = []
    for budget in (60, 5000):
        data.token_budget = budget
        tables.append(score(model_folder, data, tmp_path / str(budget), EVERY))
    for column in EVERY:
        one, other = (t.of_rows(t.rows, column)[1] for t in tables)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=column)


def test_the_cache_tells_settings_apart(
    model_folder: Path, pool_file: Path, tmp_path: Path
) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache", subsets=8, subset=0)
    cache = ScoreCache(tmp_path / "shared")

    def entries(name: str, columns: list[Column], settings: AttributeSettings) -> int:
        score(model_folder, data, tmp_path / name, columns, settings, cache)
        return len(list((tmp_path / "shared").iterdir()))

    assert entries("a", ["attention"], AttributeSettings()) == 1
    assert entries("b", ["attention"], AttributeSettings(layer=1)) == 1  # the default, said aloud
    assert entries("c", ["attention"], AttributeSettings(layer=0)) == 2
    assert entries("d", ["relevance"], AttributeSettings(["sum"])) == 3
    assert entries("e", ["relevance"], AttributeSettings(["sum", "plus"])) == 4
    assert entries("f", ["relevance"], AttributeSettings(["sum"], layer=0)) == 4
    # what a column does not rest on makes no other table
    assert entries("g", [], AttributeSettings()) == 5
    assert entries("h", [], AttributeSettings(["sum"], layer=0)) == 5


# -- prompt tokens --------------------------------------------------------------------------------


def test_a_control_table_of_prompt_tokens(tmp_path: Path, model_folder: Path) -> None:
    file = turns(tmp_path / "pool.jsonl")
    data = data_for(model_folder, file, tmp_path / "cache", targets="prompt", token_budget=60)
    cache = ScoreCache(tmp_path / "shared")
    table = score(model_folder, data, tmp_path / "t", EVERY, cache=cache)
    assert table.manifest["targets"] == "prompt"
    with pytest.raises(ValueError, match="holds the losses of prompt tokens"):
        ScoredRows(data.pool, table.rows, table, None, round=1)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    total = 0
    for row in range(3):
        ids, responses = data.pool.input_ids[row], data.pool.response_mask[row]
        places = [p for p in range(1, len(ids)) if not responses[p]]
        total += len(places)
        assert table.lists("positions")[row].tolist() == places
        assert table.lists("token_ids")[row].tolist() == ids[places].tolist()
        want = llama_nll_float64(model, ids.tolist())[np.array(places) - 1]
        np.testing.assert_allclose(of_row(table, row, "nll"), want, rtol=0, atol=2e-5)
    assert table.manifest["tokens"] == total
    # a table of responses is another one, and says nothing about targets
    data.targets = "response"
    plain = score(model_folder, data, tmp_path / "plain", EVERY, cache=cache)
    assert "targets" not in plain.manifest
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_rows_of_prompt_tokens(tmp_path: Path, model_folder: Path) -> None:
    data = data_for(model_folder, turns(tmp_path / "pool.jsonl"), tmp_path / "cache")
    rows = TokenRows(data.pool, np.array([2, 0]), "prompt")
    for place, row in enumerate((2, 0)):
        mask = data.pool.response_mask[row]
        sample = rows[place]
        assert sample.positions.tolist() == [p for p in range(1, len(mask)) if not mask[p]]
        assert rows.counts[place] == len(sample.positions)
        assert rows.lengths[place] == sample.length == sample.positions[-1]
    both = [TokenRows(data.pool, None, kind).counts for kind in ("response", "prompt")]
    lengths = [len(data.pool.input_ids[row]) for row in range(3)]
    assert (both[0] + both[1]).tolist() == [n - 1 for n in lengths]
    want = {int(i) for r in (0, 1, 2) for i in data.pool.input_ids[r][data.pool.response_mask[r]]}
    assert TokenRows(data.pool).target_ids().tolist() == sorted(want)


def test_nothing_learns_from_prompts(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = turns(tmp_path / "pool.jsonl")
    data = data_for(model_folder, file, tmp_path / "cache", targets="prompt", subsets=1)
    for refused in (lambda: data.setup("fit"), lambda: data.training_loader(TokenRows(data.pool))):
        with pytest.raises(ValueError, match=r"data\.targets: prompt is for `score` alone"):
            refused()
    with pytest.raises(SystemExit):
        cli.main(
            [
                *("fit", "--model.base.name", str(model_folder), "--data.path", str(file)),
                *("--data.targets", "prompt", "--outputs", str(tmp_path / "o"), "--name", "x"),
                *("--data.cache_dir", str(tmp_path / "c"), "--trainer.accelerator", "cpu"),
            ]
        )
    assert "data.targets: prompt is for `score` alone" in capsys.readouterr().err


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maths", "code", "medicine"])
def test_shipped_lists(name: str) -> None:
    lines = (EXPERTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert 80 <= len(lines) <= 150
    assert AttributeSettings(name).words == lines  # no blanks, no doubles
    assert all(line == line.strip() and len(line.split()) <= 2 for line in lines)


def test_words_from_a_file_and_from_a_list(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(" force \n\nmass\nangular momentum\nmass\n", encoding="utf-8")
    want = ["force", "mass", "angular momentum"]
    assert AttributeSettings(str(file)).words == want
    assert AttributeSettings([" force", "mass", "", "angular momentum", "mass"]).words == want
    assert AttributeSettings().words == []


def test_settings_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'math' is no file and none of .*\(code, maths, medi"):
        AttributeSettings("math")
    (tmp_path / "empty.txt").write_text("\n \n")
    for nothing in (str(tmp_path / "empty.txt"), ["", " "]):
        with pytest.raises(ValueError, match=r"attributes\.experts: .* holds no word"):
            AttributeSettings(nothing)
    base = BaseConfig("not loaded")
    for column in ("relevance", "relevance_hidden"):
        with pytest.raises(ValueError, match=rf"experts: the column {column} needs the words"):
            ScoringModule(base, columns=[column])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"model\.columns: gaps, x is none of gap, alone, att"):
        ScoringModule(base, columns=["x", "gaps", "gap"])  # type: ignore[list-item]


def test_a_model_of_padded_batches_has_all_but_attention(pool_file: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global"], 2]],
        bos_token_id=0,
        eos_token_id=1,
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    tokenizer.save_pretrained(tmp_path / "neo")
    data = data_for(tmp_path / "neo", pool_file, tmp_path / "cache", subsets=8, subset=0)
    others: list[Column] = ["gap", "alone", "relevance", "relevance_hidden"]
    table = score(tmp_path / "neo", data, tmp_path / "t", others)
    assert table.manifest["layout"] == "padded"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "neo").double()
    for row in table.rows:
        ids, positions = own(data, int(row))
        alone = torch.tensor([0, *ids[positions].tolist()])
        with torch.no_grad():
            logits = model(alone[None]).logits[0, :-1]
        want = torch.nn.functional.cross_entropy(logits, alone[1:], reduction="none")
        np.testing.assert_allclose(of_row(table, int(row), "alone"), want, atol=2e-5)
    with pytest.raises(ValueError, match=r"cannot be read from GPTNeoForCausalLM: .* padded"):
        score(tmp_path / "neo", data, tmp_path / "u", ["attention"])


def test_a_layer_that_is_not_there(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    data = data_for(model_folder, pool_file, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"there is no layer 2; the model has 2, numbered 0 to 1"):
        score(model_folder, data, tmp_path / "t", ["attention"], AttributeSettings(layer=2))


def test_from_the_command_line(model_folder: Path, pool_file: Path, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    cli.main(
        [
            *("score", "-c", str(root / "configs/score/xtf.yaml"), "--name", "xtf"),
            *("--model.base.name", str(model_folder), "--data.path", str(pool_file)),
            *("--model.attributes.experts", "maths", "--model.attributes.layer", "0"),
            *("--data.cache_dir", str(tmp_path / "cache"), "--outputs", str(tmp_path)),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]
    )
    manifest = json.loads((tmp_path / "xtf" / "scores" / MANIFEST).read_text())
    assert manifest["columns"] == ["attention", "attention_keys", "relevance", "relevance_hidden"]
    assert manifest["attributes"] == {"layer": 0, "experts": AttributeSettings("maths").words}
