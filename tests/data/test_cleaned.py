"""The cleaned pool is a contract: any Parquet reader finds these columns and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import byte_level_tokenizer, character_tokenizer, conversation, write_jsonl

from tokenclean.cleaning import apply as apply_module
from tokenclean.cleaning.apply import ScoredRows, clean
from tokenclean.data import cleaned as cleaned_module
from tokenclean.data.cleaned import (
    DATA,
    KIND,
    CleanedPool,
    check_tokenizer,
    cleaned_schema,
    is_cleaned_pool,
    write_cleaned_pool,
)
from tokenclean.data.formats import Reader
from tokenclean.data.pool import TokenPool, build_pool, open_pool
from tokenclean.data.rows import TokenRows
from tokenclean.data.template import Tokeniser, fingerprint_tokenizer
from tokenclean.publish import FILES, MANIFEST, read_manifest
from tokenclean.scoring.table import HISTOGRAM, ScoreTable
from tokenclean.scoring.table import KIND as SCORE_KIND
from tokenclean.selection.select import SelectionConfig

CONTRACT = {
    "id": "string",
    "source": "string",
    "input_ids": "list<element: int32>",
    "labels": "list<element: int32>",
    "response_mask": "list<element: bool>",
    "base_nll": "list<element: float>",
    "reference_nll": "list<element: float>",
    "score": "list<element: double>",
    "priority": "list<element: double>",
    "reason": "list<element: int8>",
    "weight": "list<element: float>",
    "round": "int32",
}


@pytest.fixture
def pool(tmp_path: Path) -> TokenPool:
    """Six rows of one character per token, with responses of 1 to 6 tokens, EOS included."""
    rows = [
        conversation("q", "r" * i, id=f"id-{i}", source=f"s{i % 2}", truth=[[1, 0, i // 2, -1]])
        for i in range(6)
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    build_pool(Reader([str(path)]), Tokeniser(character_tokenizer()), tmp_path / "pool")
    return open_pool(tmp_path / "pool" / "train")


WriteTable = Callable[..., ScoreTable]


@pytest.fixture
def write_table(tmp_path: Path, pool: TokenPool) -> WriteTable:
    """A score table with the given losses of all response tokens, end to end in pool order.

    ``counts`` gives rows another number of losses than they have response tokens.
    """
    from tokenclean.arrow import TableWriter, list_array
    from tokenclean.publish import complete_folder, write_json

    def write(
        model: str,
        nll: list[float],
        trained_on: list[str],
        counts: list[int] | None = None,
        **facts: Any,
    ) -> ScoreTable:
        sizes = pool.response_counts() if counts is None else counts
        pieces = np.split(np.array(nll, np.float32), np.cumsum(sizes)[:-1])
        positions = [pool.response_positions(i).astype(np.int32) for i in range(len(pool))]
        columns = {
            "id": pool.ids,
            "row": list(range(len(pool))),
            "positions": list_array(positions, pa.int32()),
            "token_ids": list_array(
                [pool.input_ids[i][p] for i, p in enumerate(positions)], pa.int32()
            ),
            "nll": list_array(pieces, pa.float32()),
        }
        manifest = {
            "kind": SCORE_KIND,
            "rows": len(pool),
            "pool": pool.fingerprint,
            "model": model,
            "trained_on": trained_on,
            **facts,
        }
        with complete_folder(tmp_path / model) as partial:
            with TableWriter(partial) as writer:
                writer.write(pa.record_batch(columns))
            write_json(partial / MANIFEST, manifest)
        return ScoreTable(tmp_path / model)

    return write


def unscored(pool: TokenPool) -> ScoredRows:
    return ScoredRows(pool, np.arange(len(pool)), None, None, round=0)


def test_schema_and_metadata_of_the_file(pool: TokenPool, tmp_path: Path) -> None:
    clean(unscored(pool), SelectionConfig("full"), 0, tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out" / DATA)
    found = {field.name: str(field.type) for field in file.schema_arrow}
    # Lists are named `item` or `element` by the library's version; the contract is their content.
    assert {k: v.replace("item:", "element:") for k, v in found.items()} == {
        **CONTRACT,
        "truth": "list<element: int8>",
    }
    assert file.schema_arrow.metadata is None
    assert set(file.metadata.metadata or {}) <= {b"ARROW:schema"}
    assert file.metadata.num_rows == len(pool)
    assert [f.name for f in cleaned_schema(with_truth=False)] == list(CONTRACT)


def test_keep_one_is_ordinary_fine_tuning_bit_for_bit(
    pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    n = int(pool.response_counts().sum())
    noise = np.random.default_rng(0).normal(size=(2, n)).tolist()
    base, reference = write_table("base", noise[0], []), write_table("reference", noise[1], [])
    scored = ScoredRows(pool, np.arange(len(pool)), base, reference, round=1)
    configs = {
        "full": (unscored(pool), SelectionConfig("full")),
        "random": (unscored(pool), SelectionConfig("random", keep=1.0)),
        "global": (scored, SelectionConfig("token_cleaning", keep=1.0)),
        "sample": (scored, SelectionConfig("token_cleaning", "sample", 1.0)),
    }
    for name, (rows, config) in configs.items():
        clean(rows, config, 0, tmp_path / name)
        table = pq.read_table(tmp_path / name / DATA).to_pylist()
        for i, row in enumerate(table):
            ids, mask = pool.input_ids[i].tolist(), pool.response_mask[i].tolist()
            assert row["input_ids"] == ids
            assert row["response_mask"] == mask
            assert row["labels"] == [t if m else -100 for t, m in zip(ids, mask, strict=True)]
            assert row["reason"] == [0 if m else 1 for m in mask]
            assert row["weight"] == [1.0] * len(ids)
        # What the trainer sees is what it would see of the raw pool.
        cleaned = TokenRows(CleanedPool(tmp_path / name, tmp_path / "cache"))
        raw = TokenRows(pool)
        assert len(cleaned) == len(raw)
        for i in range(len(raw)):
            a, b = cleaned[i], raw[i]
            assert a.input_ids.tobytes() == b.input_ids.tobytes()
            assert a.positions.tolist() == b.positions.tolist()
            assert a.weights.tobytes() == b.weights.tobytes()
        for field in ("lengths", "counts", "responses"):
            assert (getattr(cleaned, field) == getattr(raw, field)).all()


def test_scores_reasons_and_nulls_by_hand(
    pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    # Responses have 1, 2, 3, 4, 5 and 6 tokens; 21 in all.
    base = [float(i) for i in range(21)]
    reference = [0.1] * 21
    tables = write_table("base", base, []), write_table("reference", reference, ["id-5", "id-9"])
    scored = ScoredRows(pool, np.array([1, 3, 5]), *tables, round=2)
    selected = clean(
        scored, SelectionConfig("token_cleaning", keep=0.5, exclude_seen=True), 0, tmp_path / "out"
    )
    # Rows 1 and 3 hold tokens 1-2 and 6-9; row 5 was seen. int(6 * 0.5) = 3: tokens 7, 8, 9.
    assert (selected.ranked, selected.kept) == (6, 3)
    first, second, third = pq.read_table(tmp_path / "out" / DATA).to_pylist()
    prompt = len("<|user|>\nq\n<|assistant|>\n")
    assert [r["id"] for r in (first, second, third)] == ["id-1", "id-3", "id-5"]
    assert [r["source"] for r in (first, second, third)] == ["s1"] * 3
    assert {r["round"] for r in (first, second, third)} == {2}
    assert first["reason"] == [1] * prompt + [2, 2]
    assert second["reason"] == [1] * prompt + [2, 0, 0, 0]
    assert third["reason"] == [1] * prompt + [3] * 6
    assert second["labels"] == [-100] * (prompt + 1) + second["input_ids"][prompt + 1 :]
    assert second["base_nll"] == [None] * prompt + [6.0, 7.0, 8.0, 9.0]
    tenth = float(np.float32(0.1))
    assert second["reference_nll"] == [None] * prompt + [tenth] * 4
    # float64 of the stored float32 losses: not 0.1 in decimal, not rounded to float32.
    assert second["score"] == [None] * prompt + [6 - tenth, 7 - tenth, 8 - tenth, 9 - tenth]
    assert first["truth"] == [0] * prompt + [1, 1]
    assert second["truth"] == [0] * prompt + [-1, 1, 1, 1]
    manifest = CleanedPool(tmp_path / "out", tmp_path / "cache").manifest
    assert manifest["rows"] == 3
    assert manifest["rows_seen_by_reference"] == 1
    assert manifest["reasons"] == {
        "0": "kept",
        "1": "prompt",
        "2": "below the cut",
        "3": "row seen by the reference",
    }
    # codes: three kept, three below the cut, row 5 seen
    assert manifest["tokens_by_reason"] == {"s1": {"0": 3, "2": 3, "3": 6}}
    assert second["priority"] == [None] * len(second["input_ids"])  # it is the score
    rows = TokenRows(CleanedPool(tmp_path / "out", tmp_path / "cache"))
    assert rows.counts.tolist() == [0, 3, 0]
    assert rows.lengths.tolist() == [0, prompt + 3, 0]
    assert rows.responses.tolist() == [2, 4, 6]
    assert rows[0].positions.tolist() == []
    assert rows[1].positions.tolist() == [prompt + 1, prompt + 2, prompt + 3]


RULES = [
    SelectionConfig("token_cleaning", keep=0.4),
    SelectionConfig("token_cleaning", "sample", 0.4, always_keep_eos=True),
    SelectionConfig("token_cleaning", keep=0.3, always_keep_eos=True, exclude_seen=True),
    SelectionConfig("random", keep=0.5),
    SelectionConfig("oracle"),
]


@pytest.mark.parametrize("config", RULES)
def test_the_size_of_blocks_changes_nothing(
    config: SelectionConfig,
    pool: TokenPool,
    write_table: WriteTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, reference = (
        write_table(name, np.random.default_rng(i).normal(size=21).tolist(), ["id-2"])
        for i, name in enumerate(("base", "reference"))
    )
    for rows in ([0, 1, 2, 3, 4, 5], [0, 2, 5]):
        scored = ScoredRows(pool, np.array(rows), base, reference, round=1)
        assert len(list(scored.blocks(config))) == 1
        whole = clean(scored, config, 0, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(apply_module, "BLOCK_VALUES", 40)  # about a row and a half
            scored = ScoredRows(pool, np.array(rows), base, reference, round=1)
            assert len(list(scored.blocks(config))) > 1
            parts = clean(scored, config, 0, tmp_path / "parts")
        assert parts.keep.tolist() == whole.keep.tolist()
        one, other = (pq.read_table(tmp_path / name / DATA) for name in ("whole", "parts"))
        assert one.equals(other)
        assert one.column("id").to_pylist() == [f"id-{row}" for row in rows]
        manifests = [read_manifest(tmp_path / name, KIND) for name in ("whole", "parts")]
        for manifest in manifests:
            del manifest[FILES]  # a block is a row group of the file
        assert list(manifests[0].items()) == list(manifests[1].items())


@pytest.mark.parametrize("config", RULES)
def test_no_rows_at_all_make_an_empty_cleaned_pool(
    config: SelectionConfig, pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    tables = write_table("base", [1.0] * 21, []), write_table("reference", [0.0] * 21, ["id-2"])
    scored = ScoredRows(pool, np.zeros(0, dtype=np.int64), *tables, round=1)
    selected = clean(scored, config, 0, tmp_path / "out")
    assert (selected.ranked, selected.kept, selected.cut) == (0, 0, None)
    assert len(CleanedPool(tmp_path / "out", tmp_path / "cache")) == 0


def test_a_table_with_too_few_losses_for_a_row_names_the_sample(
    pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    base = write_table("base", [0.0] * 21, [])
    # Rows 2 and 3 have 3 and 4 response tokens: the total alone would not tell.
    reference = write_table("reference", [0.0] * 21, [], counts=[1, 2, 4, 3, 5, 6])
    scored = ScoredRows(pool, np.arange(6), base, reference, round=1)
    message = "reference: sample 'id-2' has 4 scores for 3 response tokens"
    with pytest.raises(ValueError, match=message):
        clean(scored, SelectionConfig("token_cleaning"), 0, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "f.jsonl", "pool", "reference"]


def test_a_loss_that_is_no_number_stops_the_selection(
    pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    base = write_table("base", [0.0] * 20 + [float("nan")], [])
    scored = ScoredRows(pool, np.arange(6), base, write_table("ref", [0.0] * 21, []), round=1)
    with pytest.raises(ValueError, match="NaN"):
        clean(scored, SelectionConfig("token_cleaning"), 0, tmp_path / "out")


def test_the_share_near_the_cut_takes_both_tables_noise(
    pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    zero = [0.0] * 21
    base = write_table("base", [float(i) for i in range(21)], [], noise={"p99": 1.25})
    config = SelectionConfig("token_cleaning", keep=0.5)
    for name, facts, noise, near in (
        ("known", {"noise": {"p99": 0.75}}, 2.0, 5 / 21),
        ("unknown", {}, None, None),
        ("unmeasured", {"noise": {}}, None, None),
    ):
        reference = write_table(name, zero, [], **facts)
        scored = ScoredRows(pool, np.arange(6), base, reference, round=1)
        # int(21 * 0.5) = 10: 11.0 is the cut, and 9.0, 10.0, 12.0 and 13.0 lie within 2 of it.
        selected = clean(scored, config, 0, tmp_path / f"out-{name}")
        assert (selected.cut, selected.near_cut) == (11.0, near)
        manifest = CleanedPool(tmp_path / f"out-{name}", tmp_path / "cache").manifest
        assert [manifest[k] for k in ("cut", "near_cut", "noise")] == [11.0, near, noise]


def test_a_histogram_is_used_only_for_the_tables_and_rows_it_was_made_for(
    pool: TokenPool, write_table: WriteTable, tmp_path: Path
) -> None:
    base = write_table("base", [float(i) for i in range(21)], [], content="one")
    reference = write_table("reference", [0.0] * 21, [])
    config, every = SelectionConfig("token_cleaning", keep=0.5), np.arange(6)

    def kept(rows: np.ndarray = every, base: ScoreTable = base) -> int:
        scored = ScoredRows(pool, rows, base, reference, round=1)
        return clean(scored, config, 0, tmp_path / "out").kept

    # A histogram of anything else shows by being refused when it is looked at.
    np.savez_compressed(
        reference.folder / HISTOGRAM, counts=np.ones(65536, dtype=np.int64), against="one"
    )
    with pytest.raises(ValueError, match="not that of these scores"):
        kept()
    assert kept(rows=np.array([1, 3, 5])) == 6
    assert kept(base=write_table("other", [0.0] * 21, [], content="two")) == 10
    assert kept(base=write_table("old", [0.0] * 21, [])) == 10


@pytest.mark.parametrize("rule", ["full", "random", "oracle"])
def test_rules_without_scores_leave_nulls(rule: str, pool: TokenPool, tmp_path: Path) -> None:
    clean(unscored(pool), SelectionConfig(rule, keep=0.5), 0, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / DATA)
    for name in ("base_nll", "reference_nll", "score"):
        column = table.column(name).combine_chunks()
        # Every row has its list, as long as its tokens; only the numbers are missing.
        assert column.null_count == 0
        assert column.values.null_count == len(column.values)
        assert column.value_lengths().to_pylist() == [
            len(pool.input_ids[i]) for i in range(len(pool))
        ]


def hand_made(rows: list[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    for row in rows:
        yield pa.RecordBatch.from_pylist([row], schema=cleaned_schema(with_truth=False))


def cleaned_row(name: str, labels: list[int], weights: list[float]) -> dict[str, Any]:
    n = len(labels)
    return {
        "id": name,
        "source": "s",
        "input_ids": list(range(10, 10 + n)),
        "labels": labels,
        "response_mask": [False, *[True] * (n - 1)],
        "base_nll": [None] * n,
        "reference_nll": [None] * n,
        "score": [None] * n,
        "reason": [0] * n,
        "weight": weights,
        "round": 0,
    }


def test_labels_and_weights_decide_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaned_module, "ROWS_PER_SHARD", 2)
    rows = [
        cleaned_row("a", [-100, 11, -100, 13, -100], [9.0, 0.5, 9.0, -1.0, 9.0]),
        cleaned_row("b", [-100, -100], [1.0, 1.0]),
        cleaned_row("c", [-100, -100, 12], [1.0, 1.0, 2.0]),
    ]
    write_cleaned_pool(
        tmp_path / "out", hand_made(rows), cleaned_schema(with_truth=False), {"tokenizer": "t"}
    )
    table = CleanedPool(tmp_path / "out", tmp_path / "cache")
    assert len(table.batches()) == 2
    assert table.manifest["rows"] == 3
    found = TokenRows(table, np.array([2, 0, 1]))
    assert [found[i].row for i in range(3)] == [2, 0, 1]
    assert [found[i].positions.tolist() for i in range(3)] == [[2], [1, 3], []]
    assert [found[i].weights.tolist() for i in range(3)] == [[2.0], [0.5, -1.0], []]
    assert found.lengths.tolist() == [2, 3, 0]
    assert found.counts.tolist() == [1, 2, 0]
    assert found.responses.tolist() == [2, 4, 1]


def test_a_label_on_the_first_token_is_no_target(tmp_path: Path) -> None:
    rows = [
        cleaned_row("a", [-100, -100, 12], [1.0] * 3),
        cleaned_row("b", [10, 11], [1.0] * 2),  # made elsewhere: a label on the first token
        cleaned_row("c", [-100, 11], [1.0] * 2),
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=cleaned_schema(with_truth=False))
    write_cleaned_pool(tmp_path / "out", [batch], batch.schema, {})
    found = TokenRows(CleanedPool(tmp_path / "out", tmp_path / "cache"))
    assert found.lengths.tolist() == [2, 1, 1]
    assert found.counts.tolist() == [1, 1, 1]
    assert [found[i].positions.tolist() for i in range(3)] == [[2], [1], [1]]


def test_unpacking_is_keyed_by_content(tmp_path: Path) -> None:
    schema = cleaned_schema(with_truth=False)
    for labels in ([-100, 11], [-100, -100]):
        # The same folder, written anew: the cache must not answer with the old one.
        batches = hand_made([cleaned_row("a", labels, [1.0, 1.0])])
        write_cleaned_pool(tmp_path / "out", batches, schema, {"made": labels})
        table = CleanedPool(tmp_path / "out", tmp_path / "cache")
        assert table.lists("labels")[0].tolist() == labels
        assert table.manifest["made"] == labels
    assert len(list((tmp_path / "cache" / "cleaned").iterdir())) == 2
    again = CleanedPool(tmp_path / "out", tmp_path / "cache")
    assert not again.lists("input_ids")[0].flags.writeable


def test_an_empty_cleaned_pool_opens(tmp_path: Path) -> None:
    write_cleaned_pool(tmp_path / "out", [], cleaned_schema(with_truth=True), {})
    rows = TokenRows(CleanedPool(tmp_path / "out", tmp_path / "cache"))
    assert len(rows) == 0
    assert rows.counts.tolist() == []


def test_what_counts_as_a_cleaned_pool(tmp_path: Path) -> None:
    assert not is_cleaned_pool(tmp_path / "missing")
    write_cleaned_pool(tmp_path / "out", [], cleaned_schema(with_truth=True), {})
    assert is_cleaned_pool(tmp_path / "out")
    (tmp_path / "out" / DATA).unlink()
    assert not is_cleaned_pool(tmp_path / "out")
    with pytest.raises(ValueError, match=f"is not a {KIND}"):
        CleanedPool(tmp_path / "missing", tmp_path / "cache")


def test_another_tokenizer_is_refused_with_both_fingerprints(
    pool: TokenPool, tmp_path: Path
) -> None:
    clean(unscored(pool), SelectionConfig("full"), 0, tmp_path / "out")
    check_tokenizer(tmp_path / "out", character_tokenizer())
    with pytest.raises(ValueError, match=r"^data\.path: ") as caught:
        check_tokenizer(tmp_path / "out", byte_level_tokenizer())
    for tokenizer in (character_tokenizer(), byte_level_tokenizer()):
        assert fingerprint_tokenizer(tokenizer) in str(caught.value)
