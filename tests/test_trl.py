"""TRL trains on exactly the tokens that were kept, and the probe that says so sees when it does
not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts import check_trl
from scripts.trl_probe import LONGEST, NO_LOSS, SETTINGS, Found, Row, Setting, probe
from tokenclean.export.content import Labelled
from tokenclean.export.formats import write_trl
from tokenclean.export.loading import trl

EOS = 1
#: Ids other than EOS occur once, so every place of a packed batch is known.
ROWS = [
    Row([2, 3, 4, 5, EOS], [NO_LOSS, NO_LOSS, 4, NO_LOSS, EOS]),
    Row([6, 7, 8, EOS, 9, 10, EOS], [NO_LOSS, 7, NO_LOSS, EOS, NO_LOSS, 10, NO_LOSS]),
    Row([11, 12, EOS], [NO_LOSS, NO_LOSS, NO_LOSS]),
    Row([13, 14, EOS], [13, NO_LOSS, EOS]),
    Row([15, EOS], [NO_LOSS, EOS]),
]
#: Their targets: 4 EOS; 7 EOS 10; none; EOS (13 has no token before it); EOS.
OURS = 7
BY_NAME = {setting.name: setting for setting in SETTINGS}


def exported(folder: Path, rows: list[Row]) -> list[Path]:
    folder.mkdir()
    ids, labels = ([i for row in rows for i in getattr(row, n)] for n in ("input_ids", "labels"))
    part = Labelled(
        np.array([len(row.labels) for row in rows]),
        np.array(ids, dtype=np.int32),
        np.array(labels, dtype=np.int32),
    )
    write_trl(folder, [part])
    return [folder / "train.jsonl", folder / "train.parquet"]


def tried(tmp_path: Path, rows: list[Row], *settings: Setting) -> list[Found]:
    """Of an export of other rows than ROWS, which are what should be trained on."""
    return probe(exported(tmp_path / "export", rows)[0], ROWS, tmp_path, settings)


def test_the_pinned_version_trains_on_what_was_kept(tmp_path: Path) -> None:
    settings = [s for s in SETTINGS if s.recommended]
    assert {s.options.get("packing", False) for s in settings} == {True, False}
    for data in exported(tmp_path / "export", ROWS):
        found = probe(data, ROWS, tmp_path, settings)
        assert [one.error for one in found] == [""] * len(settings)
        assert [(one.ours, one.trained) for one in found] == [(OURS, OURS)] * len(settings)
        assert all(one.equal and one.context < 1e-4 for one in found)


def test_the_card_shows_the_settings_that_are_tried() -> None:
    text = trl(57, '"owner/model"').text
    for setting in SETTINGS:
        if setting.recommended:
            options = {k: 57 if v == LONGEST else v for k, v in setting.options.items()}
            shown = ", ".join(
                f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in options.items()
            )
            assert f"* `{shown}`" in text
    assert 'Not so `packing_strategy="wrapped"`' in text
    assert '\nbase = "owner/model"\n' in text


def test_what_goes_wrong_is_seen(tmp_path: Path) -> None:
    names = (
        "completion_mask alone, packing: bfd",
        "packing: wrapped",
        "packing: bfd_split",
        "assistant_only_loss",
    )
    short = {"packing": True, "packing_strategy": "bfd_split", "max_length": 5}
    found = dict(
        zip(
            [*names, "split"],
            tried(tmp_path, ROWS, *(BY_NAME[n] for n in names), Setting("split", short)),
            strict=True,
        )
    )
    # every token but the first of each row
    unmasked = found["completion_mask alone, packing: bfd"]
    assert (unmasked.trained, unmasked.missing, unmasked.extra) == (15, 0, 8)
    assert not unmasked.equal
    # rows follow one another without a bound
    wrapped = found["packing: wrapped"]
    assert not wrapped.equal and wrapped.context > 1e-3
    assert found["packing: bfd_split"].equal  # nothing is longer than the longest row
    assert "not conversational" in found["assistant_only_loss"].error
    # 6 7 8 EOS 9 | 10 EOS: 10 begins a piece, and nothing predicts it
    assert (found["split"].missing, found["split"].extra) == (1, 0)


@pytest.mark.parametrize(
    ("labels", "missing", "extra"),
    [([NO_LOSS, 3, 4, NO_LOSS, EOS], 0, 1), ([NO_LOSS, NO_LOSS, NO_LOSS, NO_LOSS, EOS], 1, 0)],
)
def test_one_token_too_many_or_too_few_is_seen(
    tmp_path: Path, labels: list[int], missing: int, extra: int
) -> None:
    other = [Row(ROWS[0].input_ids, labels), *ROWS[1:]]
    for one in tried(tmp_path, other, *(s for s in SETTINGS if s.recommended)):
        assert (one.missing, one.extra, one.equal) == (missing, extra, False)


def test_rows_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    rows = [Row([2, 3], [NO_LOSS, 3]), Row([2, 4], [NO_LOSS, 4])]
    with pytest.raises(ValueError, match="row 0 begins with a token that occurs elsewhere"):
        probe(exported(tmp_path / "export", rows)[0], rows, tmp_path, SETTINGS[:1])


def test_the_hand_made_pool_is_what_it_says() -> None:
    rows = check_trl.hand_rows()
    kept = [[i != NO_LOSS for i in row.labels] for row in rows]
    assert [len(row.input_ids) for row in rows[:2]] == [1100, 1050]
    assert [sum(k) for k in kept[3:7]] == [0, 33, 7, 2] and kept[6][0]
    assert kept[9] == [False] * 8 + [True]
    fresh = [i for row in rows for i in row.input_ids if i != EOS]
    assert len(set(fresh)) == len(fresh)


def test_the_script_fails_where_a_recommended_setting_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = {"0.24.0": True, "1.6.0": False}
    common = {"data": "export/train.jsonl", "ours": 7, "trained": 7, "missing": 0, "extra": 0}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "--out" not in command:
            return subprocess.CompletedProcess(command, 0, "trl 0, transformers 0, datasets 0\n")
        data = [Path(p) for p in command[command.index("--data") + 1 :]]
        assert len(data) == 3 and all(p.is_file() for p in data)
        found = [
            {**common, "recommended": True, "equal": verdicts[command[0]], "error": ""},
            {**common, "recommended": False, "equal": False, "error": "no"},
        ]
        numbers = {"setting": "one", "context": 0.0, "uneven": 0.0}
        out = Path(command[command.index("--out") + 1])
        out.write_text(json.dumps([{**one, **numbers} for one in found]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(check_trl, "environment", lambda version, work: Path(version))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(check_trl, "newest", lambda: "0.24.0")
    assert check_trl.main(["--work", str(tmp_path), "--versions", "0.24.0", "newest"]) == 0
    # asked for twice, tried once
    assert capsys.readouterr().out.count("## trl 0,") == 1
    assert check_trl.main(["--work", str(tmp_path), "--versions", "0.24.0", "1.6.0"]) == 1
    printed = capsys.readouterr().out
    assert "1.6.0: export/train.jsonl: one" in printed and "**NO** (recommended)" in printed


def test_the_newest_version_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, which names its environment: a later one gets another."""
    answer = subprocess.CompletedProcess([], 0, "trl (1.20.3)\nAvailable versions: 1.20.3, 1.9.0\n")

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "pip", "index", "versions", "trl"]
        return answer

    monkeypatch.setattr(subprocess, "run", run)
    assert check_trl.newest() == "1.20.3"
    answer = subprocess.CompletedProcess([], 1, "", "ERROR: no matching\n")
    with pytest.raises(RuntimeError, match=r"name one with --versions: ERROR: no matching"):
        check_trl.newest()
