"""Cleaned pools exported in every layout of data, and read back as the samples they were."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from scripts.fuzz_cases import Stream, byte_level, texts
from scripts.fuzz_formats import PLACE
from tokenclean.data.cleaned import CleanedBlock
from tokenclean.data.exports import CARD, VERSION
from tokenclean.data.formats import Message, Reader, Sample, TokenSample
from tokenclean.data.pretokenised import NO_LOSS, Tokens
from tokenclean.data.spans import SpannedText, encode_spans
from tokenclean.data.template import Tokeniser
from tokenclean.export.content import Labelled
from tokenclean.export.formats import (
    Files,
    write_axolotl,
    write_jsonl,
    write_llamafactory,
    write_olmo,
    write_trl,
)
from tokenclean.export.spans import SpanWriter

LAYOUTS = ("jsonl", "spans", "axolotl", "trl", "olmo", "jsonl", "spans", "axolotl", "olmo")
WEIGHTS = (1.0, 1.0, 1.0, 0.5, 2.0, -1.0, 1e-30)


@dataclass(frozen=True)
class Case:
    """Conversations, and which of their response tokens are kept, with which weight."""

    layout: str
    turns: tuple[tuple[str, str], ...]
    kept: tuple[bool, ...]
    weights: tuple[float, ...]
    parts: bool


_flags = st.lists(st.booleans(), min_size=5, max_size=5).map(tuple)
_weights = st.lists(st.sampled_from(WEIGHTS), min_size=5, max_size=5).map(tuple)
_pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(tuple)


def _cases(layouts: tuple[str, ...]) -> st.SearchStrategy[Case]:
    return st.builds(Case, st.sampled_from(layouts), _pairs, _flags, _weights, st.booleans())


@cache
def tokeniser() -> Tokeniser:
    return Tokeniser(byte_level())


def _block(case: Case) -> CleanedBlock:
    """A cleaned pool of the case's conversations."""
    samples = [
        Sample(f"id {n}", "s", (Message("user", asked), Message("assistant", told)))
        for n, (asked, told) in enumerate(case.turns)
    ]
    made = tokeniser()(samples)
    ids = np.concatenate([m.input_ids for m in made])
    response = np.concatenate([m.response_mask for m in made])
    size = len(ids)
    kept = response & np.resize(case.kept, size)
    nan = np.full(size, np.nan)
    return CleanedBlock(
        first=0,
        ids=[s.id for s in samples],
        sources=[s.source for s in samples],
        rounds=np.ones(len(made), dtype=np.int32),
        counts=np.array([len(m.input_ids) for m in made], dtype=np.int64),
        input_ids=ids,
        labels=np.where(kept, ids, NO_LOSS).astype(np.int32),
        response=response,
        base=nan.astype(np.float32),
        reference=nan.astype(np.float32),
        score=nan,
        priority=nan,
        reason=np.where(kept, 0, np.where(response, 2, 1)).astype(np.int8),
        weight=np.where(kept, np.resize(case.weights, size), 1).astype(np.float32),
        truth=None,
    )


def _write(case: Case, block: CleanedBlock, folder: Path) -> Files:
    parts = [Labelled(block.counts, block.input_ids, block.labels)]
    if case.layout == "axolotl":
        return write_axolotl(folder, parts)
    if case.layout == "trl":
        return write_trl(folder, parts)
    if case.layout == "llamafactory":
        return write_llamafactory(folder, parts, "0123")
    if case.layout == "olmo":
        return write_olmo(folder, parts, "uint16", 64 if case.parts else 1 << 20)
    if case.layout == "jsonl":
        return write_jsonl(folder, [block], str, case.parts)
    writer = SpanWriter(tokeniser().tokenizer, "tulu", str, True, case.parts)
    return writer.write(folder, [block])


def check(case: Case, tally: Counter[str]) -> None:
    block = _block(case)
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        folder = Path(name)
        files = _write(case, block, folder)
        card = {
            "kind": "export",
            "format": case.layout,
            "version": VERSION,
            "data": files.data,
            "dtype": "uint16",
            "template": "tulu",
            "tokenizer": tokeniser().tokenizer_fingerprint,
            "eos": "</s>",
        }
        (folder / CARD).write_text(json.dumps(card), encoding="utf-8")
        found = list(Reader([name], vocabulary=len(tokeniser().tokenizer)))
    assert len(found) == len(case.turns)
    for row, item in enumerate(found):
        assert isinstance(item, TokenSample), item
        at = block.tokens_of(row)
        ids, labels = block.input_ids[at], block.labels[at]
        if isinstance(item.content, Tokens):
            assert item.content.input_ids.tolist() == ids.tolist()
            assert item.content.labels.tolist() == labels.tolist()
            if case.layout == "jsonl":
                assert item.id == block.ids[row]
                assert item.content.response_mask.tolist() == block.response[at].tolist()
                assert item.content.weight.tobytes() == block.weight[at].tobytes()
        else:
            _check_spans(item.content, block, at)
        tally["accepted"] += 1


def _check_spans(item: SpannedText, block: CleanedBlock, at: slice) -> None:
    ids = block.input_ids[at]
    found = encode_spans(item, tokeniser())
    backend = tokeniser().tokenizer.backend_tokenizer
    decoded = backend.decode(ids.tolist(), skip_special_tokens=False)
    assert f"<s>{item.text}" == decoded
    again = backend.decode(found.input_ids.tolist(), skip_special_tokens=False)
    assert again == decoded
    # The same tokens, literal or not: content that spells a special token stays text.
    assert found.input_ids.tolist() == ids.tolist()
    assert found.response_mask.tolist() == block.response[at].tolist()
    if item.text.isascii():  # else a character may be shared between tokens
        assert found.labels.tolist() == block.labels[at].tolist()
        learnt = found.labels != NO_LOSS
        assert found.weight[learnt].tobytes() == block.weight[at][learnt].tobytes()


STREAMS = {
    "exports": Stream(_cases(LAYOUTS), check, 10),
    "exports by datasets": Stream(_cases(("llamafactory",)), check, 1),
}
