"""Score tables: the negative log-likelihood of every response token under one model.

Arrow shards with a manifest, one row per sample in pool order: ``id``, ``row`` (pool row),
``positions`` list<int32>, ``token_ids`` list<int32>, ``nll`` list<float32>; index j of ``nll``
belongs to predicting the token at ``positions[j]``. Columns like it (`Column`) follow where they
were asked for; the manifest's ``columns`` lists them. A control table, whose manifest says
``targets: prompt``, holds the prompt tokens in the response tokens' stead. The ids of the samples
that the model was trained on lie beside the shards; the manifest states how many they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from tokenclean.arrow import (
    ROWS_PER_SHARD,
    ArrowTable,
    TableWriter,
    lists_of,
    read_texts,
    write_texts,
)
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.publish import MANIFEST, complete_folder, write_json
from tokenclean.selection.rule import scores
from tokenclean.selection.topk import Histogram, ordered_keys

KIND = "score table"
#: What a table can hold besides losses, float32 each.
#:
#: * ``gap``: log p(most likely token) - log p(token), nats.
#: * ``alone``: the loss with a start token (BOS, else EOS) and the sample's earlier response tokens
#:   before it, and no prompt; nats.
#: * ``attention``: what the token receives from later tokens in a deep layer, ``received`` of
#:   `AttentionReader`; NaN where no later token was computed.
#: * ``attention_keys``: ``keys`` of the first layer, one and the same number for all tokens of a
#:   sample; NaN for a token that was not computed.
#: * ``relevance``, ``relevance_hidden``: nearness to the words of a domain, by the token's input
#:   embedding (1 at their mean, 0 for the farthest entry of the vocabulary) or by its last hidden
#:   state when fed by itself (a cosine). The same for every occurrence of a token.
Column = Literal["gap", "alone", "attention", "attention_keys", "relevance", "relevance_hidden"]
#: Of the scores against the table that a reference was written `against`.
HISTOGRAM = "histogram.npz"
#: Ids of the samples that the model was trained on, ascending; not there if there are none.
TRAINED_ON = "trained_on.arrow"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("positions", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("nll", pa.list_(pa.float32())),
    ]
)


class ScoreTable(ArrowTable):
    """One model's losses.

    Attributes:
        rows: pool row of each table row, ascending, int64.
        nll: its losses, float32, one list per row.
    """

    #: older tables have the ids themselves in their manifest
    states: ClassVar[dict[str, type | UnionType]] = {"pool": str, "trained_on": int | list}

    def __init__(self, folder: Path):
        super().__init__(folder, KIND)
        rows = [batch.column("row").to_numpy() for batch in self.batches()]
        self.rows = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        self.nll = self.lists("nll")
        self._columns = {"nll": self.nll}
        more = self.manifest.get("columns", [])
        known = self.columns if self.batches() else more
        if not isinstance(more, list) or not all(isinstance(n, str) and n in known for n in more):
            raise ValueError(
                f"{self.folder / MANIFEST} is damaged: the table has not the columns that it "
                "states; delete the folder and score again"
            )
        self._columns |= {name: self.lists(name) for name in more}

    def check_pool(self, pool: TokenPool) -> None:
        """Refuse a table made from another pool.

        Raises:
            ValueError: with both fingerprints.
        """
        if self.manifest["pool"] != pool.fingerprint:
            raise ValueError(
                f"{self.folder} holds scores of another pool (fingerprint "
                f"{self.manifest['pool']}, expected {pool.fingerprint}); score it again"
            )

    def trained_on(self) -> pa.ChunkedArray:
        """Ids of the samples that the scoring model was trained on, on the memory map.

        Raises:
            ValueError: if they are not what was written.
        """
        stated = self.manifest["trained_on"]
        if isinstance(stated, list):
            try:
                return pa.chunked_array([pa.array(stated, pa.string())])
            except pa.ArrowException as error:
                raise ValueError(
                    f"{self.folder / MANIFEST} is damaged: its trained_on holds something else "
                    "than ids; delete the folder and score again"
                ) from error
        ids = read_texts(self.folder / TRAINED_ON) if stated else pa.chunked_array([], pa.string())
        if len(ids) != stated:
            raise ValueError(
                f"{self.folder / TRAINED_ON} is damaged: it holds {len(ids)} ids, and the manifest "
                f"states {stated}; delete the folder and score again"
            )
        return ids

    def of_rows(self, rows: np.ndarray, column: str = "nll") -> tuple[np.ndarray, np.ndarray]:
        """Losses, or another column, of many pool rows.

        Args:
            rows: pool rows, int64, shape (R,), in any order.
            column: ``nll`` or one of `Column`.

        Returns:
            Number of values of each row, int64, shape (R,), and the values end to end, float32.

        Raises:
            ValueError: if the table lacks the column or one of the rows.
        """
        self.check_column(column)
        return self._columns[column].take(self.places(rows))

    def check_column(self, column: str) -> None:
        """Refuse a table that was made without a column.

        Raises:
            ValueError: saying how it is made.
        """
        if column not in self._columns and self.manifest.get("imported"):
            raise ValueError(
                f"{self.folder} has no column `{column}`: it was made from log-probabilities "
                "computed elsewhere, which hold losses alone; score with the model itself, or take "
                "a rule that goes by losses"
            )
        if column not in self._columns:
            columns = [*(name for name in self._columns if name != "nll"), column]
            raise ValueError(
                f"{self.folder} has no column `{column}`; score it again, under another --name, "
                f"with --model.columns '[{', '.join(columns)}]'"
            )

    def of_row(self, row: int) -> np.ndarray:
        """Losses of one pool row, float32.

        Raises:
            ValueError: if the table lacks the row.
        """
        return self.of_rows(np.array([row]))[1]

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Table row of each pool row, int64.

        Raises:
            ValueError: if the table lacks one of the rows.
        """
        places = np.searchsorted(self.rows, rows)
        found = self.rows.take(places, mode="clip") if len(self.rows) else np.full(len(rows), -1)
        if (found != rows).any():
            missing = rows[found != rows][0]
            raise ValueError(f"{self.folder} has no scores for pool row {missing}")
        return places

    def histogram(self, base: ScoreTable) -> Histogram | None:
        """Of the keys of this table's scores against ``base``, if it was written with that one."""
        if not (self.folder / HISTOGRAM).is_file():
            return None
        with np.load(self.folder / HISTOGRAM) as stored:
            fits = str(stored["against"]) == base.manifest.get("content")
            return Histogram(stored["counts"]) if fits else None


def write_scores(
    folder: Path,
    rows: TokenRows,
    columns: Mapping[str, np.ndarray],
    manifest: dict[str, Any],
    against: ScoreTable | None = None,
) -> None:
    """Write a score table.

    Args:
        folder: where it goes.
        rows: of a token pool, ascending.
        columns: ``nll`` first, then what ``manifest["columns"]`` lists: the values of all targets
            of the rows, end to end, float32, shape (n,) each.
        manifest: what to say about model and pool; see `score_manifest`. The ids in its
            ``trained_on`` are stored beside the table.
        against: the base's table, where this one is a reference: the histogram of the scores is
            then stored with the table.
    """
    table = rows.table
    assert isinstance(table, TokenPool)
    starts = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int64)
    others = [name for name in columns if name != "nll"]
    schema = pa.schema([*_SCHEMA, *(pa.field(name, pa.list_(pa.float32())) for name in others)])
    content, histogram = hashlib.sha256(rows.rows.tobytes()), Histogram()
    with complete_folder(folder) as partial:
        writer = TableWriter(partial)
        for first in range(0, len(rows), ROWS_PER_SHARD):
            chosen = rows.rows[first : first + ROWS_PER_SHARD]
            part = slice(starts[first], starts[first + len(chosen)])
            counts = rows.counts[first : first + len(chosen)]
            positions, tokens = rows.targets_of(first, first + len(chosen))
            batch = pa.record_batch(
                {
                    "id": table.ids.take(chosen),
                    "row": chosen,
                    "positions": lists_of(counts, positions.astype(np.int32)),
                    "token_ids": lists_of(counts, tokens),
                    **{name: lists_of(counts, column[part]) for name, column in columns.items()},
                },
                schema=schema,
            )
            writer.write(batch)
            content.update(columns["nll"][part].tobytes())
            if against is not None:
                base = against.of_rows(chosen)[1]
                histogram.add(ordered_keys(scores(base, columns["nll"][part])))
        writer.close()
        for name in others:
            content.update(columns[name].data)  # whole, so that shards make no difference
        if against is not None:
            np.savez_compressed(
                partial / HISTOGRAM,
                counts=histogram.counts,
                against=against.manifest.get("content", ""),
            )
        trained_on = sorted(manifest["trained_on"])
        if trained_on:
            write_texts(partial / TRAINED_ON, trained_on)
        write_json(
            partial / MANIFEST,
            {
                "kind": KIND,
                **manifest,
                "trained_on": len(trained_on),
                "rows": len(rows),
                "tokens": int(starts[-1]),
                "content": content.hexdigest()[:16],
            },
        )
