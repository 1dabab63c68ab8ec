"""What `tokenclean show` prints, to the letter; and that no data steers the terminal."""

from __future__ import annotations

import hashlib
import io
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import byte_level_tokenizer, character_tokenizer
from rich.console import Console

from tokenclean.data.cleaned import CleanedBlock, cleaned_schema, read_blocks, write_cleaned_pool
from tokenclean.data.template import fingerprint_tokenizer
from tokenclean.report import show as shown
from tokenclean.report.show import escaped, show, tokens

TEXT_LEGEND = "{=prompt=}  kept  [-dropped-]  ↵ line break"
NONE: float | None = None
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def sample(id: str, text: str, marks: str, **columns: Any) -> dict[str, Any]:
    """One token per character. Marks: p prompt, k kept, d dropped, u to be unlearnt."""
    return {"id": id, "source": "made", "round": 1, "text": text, "marks": marks, **columns}


def write_pool(folder: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    columns: dict[str, list[Any]] = {
        name: [] for name in cleaned_schema(with_truth=False).names
    }  # fmt: skip
    for row in rows:
        ids = row.get("ids") or tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        marks = row["marks"]
        assert len(ids) == len(marks), (len(ids), len(marks))
        empty = [NONE] * len(ids)
        base, reference = row.get("base", empty), row.get("reference", empty)
        columns["id"].append(row["id"])
        columns["source"].append(row["source"])
        columns["round"].append(row["round"])
        columns["input_ids"].append(ids)
        columns["labels"].append(
            [i if m in "ku" else -100 for i, m in zip(ids, marks, strict=True)]
        )
        columns["response_mask"].append([m != "p" for m in marks])
        columns["base_nll"].append(base)
        columns["reference_nll"].append(reference)
        pairs = zip(base, reference, strict=True)
        columns["score"].append([None if b is None or r is None else b - r for b, r in pairs])
        columns["priority"].append(empty)
        columns["reason"].append([{"p": 1, "k": 0, "d": 2, "u": 2}[m] for m in marks])
        columns["weight"].append([-1.0 if m == "u" else 1.0 for m in marks])
    schema = cleaned_schema(with_truth=False)
    manifest = {
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "reasons": {"0": "kept", "1": "prompt", "2": "below the cut"},
        "selection": {"rule": "token_cleaning"},
    }
    write_cleaned_pool(folder, [pa.record_batch(columns, schema=schema)], schema, manifest)


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def given(tmp_path: Path, characters: Path) -> list[str]:
    """A bare cleaned pool of four samples, as arguments of the verb."""
    base = [NONE] * 4 + [1.0, 2.0, 3.0, 0.5]
    reference = [NONE] * 4 + [0.5, 2.5, 1.0, 0.5]
    rows = [
        sample("one", "Hi?\nab.$", "ppppkddk", base=base, reference=reference),
        sample("two", "a[-b-]c\\", "ppkkddkk"),
        sample("three", "Hi?\nab.$", "ppppkudk", source="other", round=0),
        sample("four", "xyz", "pkk"),
    ]
    write_pool(tmp_path / "pool", character_tokenizer(), rows)
    return [str(tmp_path / "pool"), "--tokenizer", str(characters)]


def true_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal says of itself; the same in every test, since rich remembers a style's."""
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def no_colours_of_the_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLORTERM", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    show(list(argv))
    return capsys.readouterr().out


def test_where_there_are_no_colours_marks_take_their_place(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # base: (1 + 2 + 3 + 0.5) / 4, reference: (0.5 + 2.5 + 1 + 0.5) / 4
    assert printed(capsys, *given, "--id", "one") == (
        f"{TEXT_LEGEND}\n\n"
        "one | source made | round 1 | 2 of 4 response tokens kept | "
        "mean base 1.625, reference 1.125, score 0.500 nats\n"
        "{=Hi?↵\n=}a[-b.-]$\n"
    )
    assert printed(capsys, *given, "--id", "three", "--id", "four") == (
        "{=prompt=}  kept  [-dropped-]  [~unlearnt~]  ↵ line break\n\n"
        "three | source other | round 0 (not cleaned) | 2 of 4 response tokens kept | "
        "1 to be unlearnt\n"
        "{=Hi?↵\n=}a[~b~][-.-]$\n\n"
        "four | source made | round 1 | 2 of 2 response tokens kept\n"
        "{=x=}yz\n"
    )


def test_marks_of_the_data_are_told_from_ours(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # a[-b-]c\ : prompt a[, kept -b, dropped -], kept c\
    out = printed(capsys, *given, "--id", "two", "--text")
    assert out.splitlines()[-1] == r"{=a\[=}-b[-\-]-]c\\"


def decoded(text: str) -> list[tuple[str, str]]:
    """Kind and text of every run, by the rules that the module states."""
    opening = {"{=": "prompt", "[-": "dropped", "[~": "unlearnt"}
    closing = {"prompt": "=}", "dropped": "-]", "unlearnt": "~]"}
    runs: list[tuple[str, str]] = []
    kind, said, i = "kept", "", 0

    def end() -> None:
        if said:
            runs.append((kind, said))

    while i < len(text):
        two = text[i : i + 2]
        if kind == "kept" and two in opening:
            end()
            kind, said, i = opening[two], "", i + 2
        elif kind != "kept" and two == closing[kind]:
            end()
            kind, said, i = "kept", "", i + 2
        elif two == "↵\n":
            said, i = said + "\n", i + 2
        elif text[i] == "\\" and two[1] in "xuU":
            digits = {"x": 2, "u": 4, "U": 8}[two[1]]
            said += chr(int(text[i + 2 : i + 2 + digits], 16))
            i += 2 + digits
        elif text[i] == "\\" and two[1] in "tr":
            said, i = said + {"t": "\t", "r": "\r"}[two[1]], i + 2
        elif text[i] == "\\" and two[1] in "\\[{-=~":
            said, i = said + two[1], i + 2
        else:
            said, i = said + text[i], i + 1
    end()
    return runs


def test_the_original_can_be_told_from_what_is_printed() -> None:
    draw = random.Random(0)
    alphabet = "[]{}-=~\\txu0a↵\n\r\t\x1b\x07\x9b\u202e\u200f\u2028\ufeff\U000e0041é漢"
    for _ in range(3000):
        kinds = [draw.choice(list(shown.STYLES)) for _ in range(draw.randint(1, 6))]
        texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 4))) for _ in kinds]
        runs: list[tuple[str, str]] = []
        for kind, text in zip(kinds, texts, strict=True):
            before = runs.pop()[1] if runs and runs[-1][0] == kind else ""
            runs.append((kind, before + text))
        assert decoded(tokens(texts, kinds, coloured=False).plain) == runs


def test_escapes_are_those_of_python() -> None:
    assert escaped("a\tb\x00\x1b[31m\x7f\x9b\u202e\U000e0041") == (
        r"a\tb\x00\x1b[31m\x7f\x9b\u202e\U000e0041"
    )
    assert escaped("one\n\ntwo\r\n") == "one↵\n↵\ntwo\\r↵\n"
    # outside marks a bracket is a bracket, and a backslash is doubled only before an escape
    assert escaped(r"[-1] \alpha \times \\") == r"[-1] \alpha \\times \\\\"
    assert escaped("ünïcode 漢字 עברית 🙂") == "ünïcode 漢字 עברית 🙂"


@pytest.mark.parametrize("coloured", [False, True])
def test_nothing_of_the_data_steers_the_terminal(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    coloured: bool,
) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07\u202edlrow\r\x00\x9b31m[bold]x[/bold] :smile:"
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(hostile, add_special_tokens=False)["input_ids"]
    row = sample(f"id{hostile}", "", "d" * len(ids), ids=ids, source=f"s{hostile}")
    write_pool(tmp_path / "pool", tokenizer, [row])
    if coloured:
        true_colours(monkeypatch)
    place = [str(tmp_path / "pool"), "--tokenizer", str(tmp_path / "tokenizer")]
    out = printed(capsys, *place, "--losses", "--width", "200")
    assert bool(ESCAPE.search(out)) == coloured
    rest = ESCAPE.sub("", out)
    assert all(c == "\n" or c.isprintable() for c in rest)
    # id, source and text, each as it is but for escapes
    assert rest.replace("\n", "").count(r"\x1b[2J\x1b]0;title\x07\u202edlrow\r\x00\x9b31m") == 3
    assert rest.replace("\n", "").count("[bold]x[/bold] :smile:") == 3


def test_colours_and_strike_through(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_colours(monkeypatch)
    out = printed(capsys, *given, "--id", "one", "--width", "120")
    blue, orange = "38;2;0;0;0;48;2;86;180;233", "38;2;0;0;0;48;2;230;159;0"
    assert out.splitlines()[-2:] == [
        "\x1b[2mHi?↵\x1b[0m",
        f"\x1b[{blue}ma\x1b[0m\x1b[9;{orange}mb.\x1b[0m\x1b[{blue}m$\x1b[0m",
    ]
    assert "[-" not in out
    # without colours the strike would be all that is left
    assert "a[-b.-]$" in printed(capsys, *given, "--id", "one", "--text")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "a[-b.-]$" in printed(capsys, *given, "--id", "one")


def test_a_line_per_response_token(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *given, "--id", "one", "--losses").splitlines()[-5:]
    assert [line.split() for line in lines] == [
        ["place", "token", "id", "base", "reference", "score", "reason"],
        ["4", '"a"', *_id("a"), "1.0000", "0.5000", "0.5000", "kept"],
        ["5", '"b"', *_id("b"), "2.0000", "2.5000", "-0.5000", "below", "the", "cut"],
        ["6", '"."', *_id("."), "3.0000", "1.0000", "2.0000", "below", "the", "cut"],
        ["7", '"$"', "0", "0.5000", "0.5000", "0.0000", "kept"],
    ]
    lines = printed(capsys, *given, "--id", "three", "--losses").splitlines()[-3:]
    assert lines[0].split() == [
        "5", '"b"', *_id("b"), "-", "-", "-", "-1.0000", "below", "the", "cut"
    ]  # fmt: skip


def _id(character: str) -> list[str]:
    """Of the character tokenizer: `$`, unknown, then printable ASCII without `$`."""
    characters = [chr(c) for c in range(32, 127) if chr(c) != "$"]
    return [str(2 + characters.index(character))]


def shown_ids(out: str) -> list[str]:
    return re.findall(r"^(?:\w+: )?([\w-]+) \| source", out, flags=re.M)


def test_first_source_and_random(
    tmp_path: Path, characters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [sample(f"row-{i}", "ab", "pk", source="odd" if i % 2 else "even") for i in range(40)]
    write_pool(tmp_path / "pool", character_tokenizer(), rows)
    given = [str(tmp_path / "pool"), "--tokenizer", str(characters)]
    assert shown_ids(printed(capsys, *given)) == ["row-0", "row-1", "row-2"]
    out = printed(capsys, *given, "--source", "odd", "--first", "2")
    assert shown_ids(out) == ["row-1", "row-3"]
    odd = [f"row-{i}" for i in range(1, 40, 2)]
    for seed in ("0", "5"):
        drawn = sorted(odd, key=lambda id: hashlib.sha256(f"{seed}:{id}".encode()).hexdigest())[:4]
        out = printed(capsys, *given, "--source", "odd", "--random", "4", "--seed", seed)
        assert shown_ids(out) == drawn
    assert len(shown_ids(printed(capsys, *given, "--random", "1000"))) == 40


def test_what_is_not_there_is_refused(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sample 'thre'; nearest: 'three', "):
        show([*given, "--id", "one", "--id", "thre"])
    with pytest.raises(ValueError, match="'else' does not occur; there are 'made', 'other'"):
        show([*given, "--source", "else"])
    with pytest.raises(ValueError, match="--first 0: give 1 or more"):
        show([*given, "--first", "0"])
    with pytest.raises(ValueError, match="--source goes with --first and --random"):
        show([*given, "--id", "one", "--source", "made"])
    with pytest.raises(ValueError, match="name its tokenizer with --tokenizer"):
        show(given[:1])


def test_arms_one_below_the_other(
    tmp_path: Path, characters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arm, marks in (("left", "pkd"), ("right", "pdk")):
        rows = [sample("one", "abc", marks), sample("two", "abc", "pkk")]
        if arm == "right":
            rows = rows[:1]
        write_pool(tmp_path / "arms" / arm / "cleaned", character_tokenizer(), rows)
    given = [str(tmp_path), "--tokenizer", str(characters)]
    out = printed(capsys, *given, "--arm", "right", "--arm", "left", "--id", "one")
    assert out.split("\n\n")[1:] == [
        "right: one | source made | round 1 | 1 of 2 response tokens kept\n{=a=}[-b-]c",
        "left: one | source made | round 1 | 1 of 2 response tokens kept\n{=a=}b[-c-]\n",
    ]
    out = printed(capsys, *given, "--arm", "left", "--arm", "right", "--id", "two")
    assert out.endswith("\n{=a=}bc\n\nright: two is not in its pool\n")
    with pytest.raises(ValueError, match="choose from 'left', 'right'"):
        show([*given, "--id", "one"])


def test_reading_ends_with_the_last_sample(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def one_by_one(folder: Path) -> Iterator[CleanedBlock]:
        for block in read_blocks(folder, rows=1):
            seen.extend(block.ids)
            yield block

    monkeypatch.setattr(shown, "read_blocks", one_by_one)
    assert shown_ids(printed(capsys, *given, "--id", "two", "--id", "one")) == ["two", "one"]
    assert seen == ["one", "two"]


def test_an_output_that_is_not_unicode(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show([*given, "--id", "one"])
    sys.stdout.flush()
    assert b"{=Hi?\\u21b5\n=}a[-b.-]$" in raw.getvalue()


def test_a_reader_that_has_seen_enough(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    # rich also turns the process's standard output away, which the other tests need
    monkeypatch.setattr(Console, "on_broken_pipe", lambda console: sys.exit(1))
    monkeypatch.setattr(sys, "stdout", Closed())
    show([*given, "--id", "one"])
