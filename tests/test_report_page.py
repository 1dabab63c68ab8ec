"""The report's page: what it says, that it runs nothing it should not, and how it works by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import BrowserPage, byte_level_tokenizer, character_tokenizer
from matplotlib.figure import Figure
from test_report_samples import draw, sample, write_pool

from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.models import BaseConfig, load_tokenizer
from tokenclean.report import fragments
from tokenclean.report.content import Drawing, Section, Table
from tokenclean.report.embedded import Texts, embed
from tokenclean.report.figures import save
from tokenclean.report.glance import _cut, changed_most, facts
from tokenclean.report.page import ArmPart, asset, inline_image, write_page
from tokenclean.report.plain import decimal, markdown, shown_column, visible
from tokenclean.report.samples import Count, Draw
from tokenclean.report.verb import report

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!-- <script>",
    "\"'><img src=x onerror=alert(3)>",
    "\u202e\u200fabc\u2066",
    "\x00\x07\x1b[31m\u2028\ufeff",
    "${alert(4)} {{alert(5)}} javascript:alert(6)",
    "a|b\\c %3Cscript%3E &lt;b&gt;",
]


def build(
    path: Path,
    arms: Sequence[CleanedArm],
    tokenizer: Any,
    sections: Mapping[str, Sequence[Section]] | None = None,
    limit: int = 100,
    **options: Any,
) -> list[str]:
    """A page of arms; ``sections`` are those of some of them."""
    texts = Texts(tokenizer)
    draws: dict[str, Draw] = {arm.name: draw(arm, limit) for arm in arms}
    rows = embed(draws, texts, 3_000_000)
    run = FinishedRun(arms[0].folder)
    parts = [
        ArmPart(
            draws[arm.name],
            facts(run, arm, draws[arm.name], {}),
            list((sections or {}).get(arm.name, [])),
            rows[arm.name],
        )
        for arm in arms
    ]
    return write_page(path, "A page", ["What it shows."], [], parts, texts, **options)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Four samples of two sources in two arms, one token per character."""
    rows = [
        sample(
            "one", "red", "Hi?", "abc\n", "1010", [2.0, 4.0, 1.0, 3.0], [1.0, 4.5, 0.5, 3.25],
            truth=[1, -1, 1, 0], round=1,
        ),
        sample("two", "red", "Yo?", "de", "11", [2.0, 2.0], [0.25, 1.0], truth=[1, 1]),
        sample("three", "blue", "Eh?", "fg", "00", [2.0, 2.0], [2.5, 6.0], truth=[0, 1]),
        sample("four", "blue", "Oh?", "xyzzy", "11110", [1.0] * 5, [0.5] * 4 + [1.5]),
    ]  # fmt: skip
    tokenizer = character_tokenizer()
    one = write_pool(tmp_path / "cleaning", rows, tokenizer, cut=0.125)
    reasons = {"0": "kept", "1": "prompt", "8": "XTF: task relevance"}
    other = write_pool(
        tmp_path / "other",
        [
            sample("one", "red", "Hi?", "abc\n", "1001", weights=[1, -0.5, 0, 0.25],
                   reasons=[0, 8, 8, 0], priority=[3.0, 1.0, 2.0, 4.0]),
            sample("five", "red", "Ah?", "gh", "11"),
        ],
        tokenizer,
        reasons=reasons,
    )  # fmt: skip
    build(tmp_path / "page.html", [one, other], tokenizer)
    return tmp_path / "page.html"


def status(page: Any) -> str:
    return str(page.locator("[role=status]:visible").inner_text())


def shown(page: Any) -> list[str]:
    return list(page.locator("article:visible h4").all_inner_texts())


def tip(page: Any) -> dict[str, str]:
    names = page.locator("#tip dt").all_inner_texts()
    return dict(zip(names, page.locator("#tip dd").all_inner_texts(), strict=True))


# -- without a browser ----------------------------------------------------------------------------


def test_the_policy_names_the_script_and_the_styles_by_their_hashes(small: Path) -> None:
    html = small.read_text(encoding="utf-8")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    # one script that runs and one that is data; no handler, no address outside
    assert html.count("<script") == 2
    assert not re.search(r"\son\w+=|style=|https?://", re.sub(r"(?s)<script.*", "", html))


def test_the_script_writes_no_markup() -> None:
    script = asset("page.js")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", script
    )


def test_the_same_pools_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    arms = [CleanedArm(n, tmp_path / n, tmp_path / n / "cleaned") for n in ("cleaning", "other")]
    build(tmp_path / "again.html", arms, character_tokenizer())
    assert (tmp_path / "again.html").read_bytes() == small.read_bytes()


def test_data_is_escaped_where_it_stands() -> None:
    for value in HOSTILE:
        for written in (fragments.text(value), fragments.attribute(value)):
            bare = re.sub(r"</?bdi>|<span class=\"mark\">|</span>", "", written)
            assert not re.search(r"[<>\"\x00\x1b\u202e\u2028]", bare.replace("&quot;", ""))
    assert fragments.text("a<b>\u202ec") == (
        '<bdi>a&lt;b&gt;<span class="mark">U+202E</span>c</bdi>'
    )
    assert fragments.text("plain & simple") == "plain &amp; simple"
    # joiners are part of how words are written
    assert visible("\u0645\u200c\u0646 a\u200bb\n") == "\u0645\u200c\u0646 a⟨U+200B⟩b⟨U+000A⟩"


def test_names_in_links_are_plain_and_differ() -> None:
    taken: set[str] = set()
    names = ["a b", "a-b", "../x", "<script>", "\u202e", ""]
    found = [fragments.slug(name, taken) for name in names]
    # no hyphen: it stands between an arm and the parts of its section, so `a-1` is part 1 of `a`
    assert found == ["a_b", "a_b_2", "x", "script", "x_2", "x_3"]


def test_numbers_of_a_column_have_as_many_digits() -> None:
    assert shown_column([0.5, None, 0.25]) == ["0.500", "–", "0.250"]
    assert shown_column([1234.5, -1.25]) == ["1,234.5", "−1.2"]
    assert shown_column([-0.00044, -0.00135]) == ["−0.0004", "−0.0014"]
    assert shown_column([123456, True, "x", float("nan")]) == ["123,456", "yes", "x", "–"]
    assert shown_column([0.5, 1e-7, 0.0]) == ["0.500", "1e−07", "0.000"]
    assert shown_column([float("inf"), 1.0]) == ["inf", "1.000"]


def test_tables_as_markdown() -> None:
    table = Table("t", "Kept", ["source", "share"], [["a|b", 0.5], ["c\x1b", None]], ["A note."])
    assert markdown([Section("s", "Totals", ["Words."], [table])]) == (
        "## Totals\n\nWords.\n\n**Kept**\n\n| source | share |\n|---|---:|\n"
        "| a\\|b | 0.500 |\n| c⟨U+001B⟩ | – |\n\nA note.\n"
    )


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = [[f"r{i}", i] for i in range(1000)]
    html = fragments.table(Table("t", "Long", ["a", "b"], rows), "t0")
    assert html.count("<tr>") == 251 and "240 more rows" in html
    assert "The first 250 of 1,000 rows." in html
    assert 'href="tables/t.csv"' in html


def test_figures_that_do_not_fit_are_left_out_in_turn(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    rows = [sample("one", "red", "Hi?", "ab", "10")]
    arms = [write_pool(tmp_path / name, rows, tokenizer) for name in ("x", "y")]
    drawings = [Drawing(f"f{i}", f"Figure {i}", "Noise.", "noise") for i in range(6)]
    for i, drawing in enumerate(drawings):
        figure = Figure(figsize=(2, 2), dpi=150)
        figure.subplots().imshow(np.random.default_rng(i).random((150, 150)), cmap="gray")
        save(figure, tmp_path / "figures" / f"{drawing.name}.png")
    sections = {
        "x": [Section("s", "Pictures", drawings=drawings[:2]), Section("t", "More", drawings=[])],
        "y": [Section("s", "Pictures", drawings=drawings[2:])],
    }
    page = tmp_path / "page.html"
    assert build(page, arms, tokenizer, sections) == []
    size = page.stat().st_size
    found = []
    for limit in (size + 1000, size - 30_000, size // 2, 60_000):
        found.append(build(page, arms, tokenizer, sections, max_bytes=limit))
        assert page.stat().st_size <= limit
        html = page.read_text(encoding="utf-8")
        assert html.count("Left out of the page") == len(found[-1])
        assert all(f'figures/{name}.png"' in html for name in found[-1])
    # the first of each arm, the second of each, and then the rest: f0 f2 f1 f3 f4 f5
    assert found[:2] == [[], ["f5"]]
    assert found[2] == ["f1", "f3", "f4", "f5"][-len(found[2]) :]
    assert len(found[3]) == 6


def test_a_figure_in_the_page_shows_the_same_with_fewer_colours(tmp_path: Path) -> None:
    from PIL import Image

    figure = Figure(figsize=(4, 3), dpi=150)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#0072B2")
    axes.imshow(np.linspace(0, 1, 4096).reshape(64, 64), extent=(0, 1, 0, 1))
    save(figure, tmp_path / "f.png")
    uri, width, height = inline_image(tmp_path / "f.png")
    (tmp_path / "small.png").write_bytes(base64.b64decode(uri.partition(",")[2]))
    assert (width, height) == (375, 281)
    assert (tmp_path / "small.png").stat().st_size < (tmp_path / "f.png").stat().st_size
    before, after = (
        np.asarray(Image.open(tmp_path / name).convert("RGB"), dtype=np.int64)
        for name in ("f.png", "small.png")
    )
    assert np.abs(before - after).mean() < 2


def test_what_a_stranger_asks_first(small: Path, tmp_path: Path) -> None:
    arm = CleanedArm("cleaning", tmp_path / "cleaning", tmp_path / "cleaning" / "cleaned")
    found = dict(facts(FinishedRun(arm.folder), arm, draw(arm), {}))
    assert found["Kept"] == "8 of 13 ranked response tokens (61.5 %); 5 dropped."
    # red loses 2 of 6; blue 3 of 7, which is most either way
    assert found["Lost most"] == (
        "blue lost most tokens: 3 of 7 (42.9 %), and the largest share of its own."
    )
    assert found["Cut"].startswith("score (base loss − reference loss, nats) from 0.12500 upwards")
    assert "Asked to keep: 0.6." in found["Rule"]


def test_which_round_changed_most() -> None:
    manifest = {
        "schedule": "self_evolving",
        "rounds": [{"cut": None}, {"cut": 0.5}, {"cut": 0.25}, {"cut": 0.75}],
    }
    arm = CleanedArm("arm", Path(), Path())
    arm.__dict__["manifest"] = manifest
    drawn = Draw(arm, 1)
    drawn.rounds = {n: Count() for n in range(4)}
    assert changed_most(arm, drawn, {})[0][1].startswith("Round 3 by its cut, 0.25000 to 0.75000.")
    scalars: dict[int, dict[str, float]] = {1: {}, 2: {"agreement": 0.75}, 3: {"agreement": 0.875}}
    assert changed_most(arm, drawn, scalars)[0][1].startswith("Round 2: 25.0 % of the panel")


BASE = Path(fragments.__file__).parent.parent / "data" / "planted_base"


def planted_run(folder: Path) -> Path:
    """A run of two arms over a few planted samples."""
    tokenizer = load_tokenizer(BaseConfig(name=str(BASE)))
    text = "The capital of Pranoss is Tarok."
    n = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = [
        sample(
            f"s{i}", "ab"[i % 2], "<|user|> Name it.", text, "10" * (n // 2) + "1" * (n % 2),
            [1.0 + i / 8] * n, [0.5 + (k % 2) for k in range(n)], truth=[1] * n,
        )
        for i in range(8)
    ]  # fmt: skip
    known: dict[str, Any] = {
        "eos_id": 1, "pool": "p", "seed": 0, "template": "tulu", "max_length": 512,
        "base": "b", "reference": "b+r", "cut": 0.25, "near_cut": 0.0, "noise": 1e-6,
        "response_tokens": 8 * n, "ranked_tokens": 8 * n, "kept_tokens": 8 * ((n + 1) // 2),
    }  # fmt: skip
    for name in ("one", "two"):
        write_pool(folder / "arms" / name, rows, tokenizer, **known)
    return folder


def test_the_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planted_run(tmp_path / "run")
    report([str(run), "--tokenizer", str(BASE), "--arm", "two", "--samples", "5", "--text"])
    page = run / "report" / "report.html"
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{page} ({page.stat().st_size / 1e6:.1f} MB)"
    assert "## At a glance of two" in out and "two (1 of 1)" in err
    html = page.read_text(encoding="utf-8")
    assert "Showing 5 of 8 samples" in html and "Arm two" in html and "Arm one" not in html
    for link in set(re.findall(r'href="((?:figures|tables)/[^"]+)"', html)):
        assert (page.parent / link).is_file(), link
    assert list(page.parent.glob("tensorboard/**/events.*"))
    before = page.read_bytes()

    # an old report stays until a new one is complete
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no page")

    with monkeypatch.context() as patch:
        patch.setattr("tokenclean.report.sections.sections", fail)
        with pytest.raises(ValueError, match="no page"):
            report([str(run), "--tokenizer", str(BASE), "--arm", "two"])
    assert page.read_bytes() == before
    assert [p.name for p in run.iterdir() if p.name.startswith("report")] == ["report"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arm", "three"], "no arm 'three'"),
        (["--samples", "0"], "--samples 0: show one at least"),
        ([], "--tokenizer"),
    ],
)
def test_what_the_verb_refuses(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        report([str(planted_run(tmp_path / "run")), *options])
    assert not (tmp_path / "run" / "report").exists()


# -- in a browser ---------------------------------------------------------------------------------


def test_filters_order_and_search(browser_page: BrowserPage, small: Path) -> None:
    page = browser_page.open(small)
    assert status(page) == "4 of 4 samples match; 1 to 4 below"
    assert shown(page) == ["one", "two", "three", "four"]
    page.get_by_label("source").first.select_option(label="blue")
    assert shown(page) == ["three", "four"]
    page.get_by_label("kept share from, percent").first.fill("10")
    assert (shown(page), status(page)) == (["four"], "1 of 4 samples match; 1 to 1 below")
    page.get_by_label("source").first.select_option(label="all sources")
    # kept shares: one 50, two 100, three 0, four 80 percent
    page.get_by_label("kept share to, percent").first.fill("80")
    assert shown(page) == ["one", "four"]
    # 80 to 10 is meant as 10 to 80
    page.get_by_label("kept share from, percent").first.fill("80")
    page.get_by_label("kept share to, percent").first.fill("10")
    assert shown(page) == ["one", "four"]
    page.get_by_label("kept share from, percent").first.fill("")
    page.get_by_label("kept share to, percent").first.fill("")
    order = page.get_by_label("order").first
    order.select_option("lowest_share")
    assert shown(page) == ["three", "one", "four", "two"]
    order.select_option("highest_share")
    assert shown(page) == ["two", "four", "one", "three"]
    order.select_option("dropped")
    assert shown(page) == ["one", "three", "four", "two"]
    # largest scores: 1, 1.75, -0.5, 0.5; smallest: -0.5, 1, -4, -0.5
    order.select_option("highest")
    assert shown(page) == ["two", "one", "four", "three"]
    order.select_option("lowest")
    assert shown(page) == ["three", "one", "four", "two"]
    search = page.get_by_label("text or id contains").first
    search.fill("ABC")
    assert shown(page) == ["one"]
    search.fill("thr")
    assert shown(page) == ["three"]
    search.fill("?x")
    assert shown(page) == ["four"]
    search.fill("no such text")
    assert (shown(page), status(page)) == ([], "0 of 4 samples match")
    assert browser_page.errors == []


def test_what_is_known_of_a_token(browser_page: BrowserPage, small: Path) -> None:
    page = browser_page.open(small)
    token = page.locator("article").first.locator(".t", has_text="b")
    assert token.get_attribute("class") == "t dropped corrupted"
    assert token.evaluate("e => getComputedStyle(e).textDecorationLine") == "line-through"
    assert not page.locator("#tip").is_visible()
    token.hover()
    # scores of the arm: -4 -0.5 -0.5 -0.5 -0.25 0.5 x 5 1 1 1.75: one below -0.5, half of three
    assert tip(page) == {
        "token id": str(ord("b") - 31),
        "state": "dropped: below the cut",
        "base loss": "4.0000 nats",
        "reference loss": "4.5000 nats",
        "score": "−0.50000 (percentile 19.2)",
        "cut": "0.12500",
        "planted truth": "corrupted",
        "position": "token 5 of 7 of the sample",
    }
    page.mouse.move(2, 2)
    page.locator("#tip").wait_for(state="hidden")
    page.locator("article").first.locator(".t.prompt").first.hover()
    assert tip(page) == {
        "token id": str(ord("H") - 31),
        "state": "prompt",
        "position": "token 1 of 7 of the sample",
    }
    page.goto(small.as_uri() + "#other/sample/one")
    article = page.locator("article:visible").first
    article.locator(".t", has_text="b").hover()
    # priorities 1 2 3 4: half of one below 1 of four, 12.5 percent
    assert tip(page) == {
        "token id": str(ord("b") - 31),
        "state": "dropped and unlearnt: XTF: task relevance",
        "ranked by": "1.00000 (percentile 12.5)",
        "weight": "−0.5",
        "position": "token 5 of 7 of the sample",
    }
    assert article.locator(".t.unlearnt").all_inner_texts() == ["b"]
    article.locator(".t.kept").last.hover()
    assert tip(page)["weight"] == "0.25"
    assert browser_page.errors == []


def test_by_keyboard_alone(browser_page: BrowserPage, small: Path) -> None:
    page = browser_page.open(small)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
    focused = "document.activeElement.getAttribute('aria-label')"
    # the first response token of the first sample; one stop for the whole text
    assert page.evaluate(focused) == "a, kept"
    assert tip(page)["score"] == "1.00000 (percentile 84.6)"
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip-facts"
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "Home", "End", "ArrowUp"):
        page.keyboard.press(key)
        said.append(page.evaluate(focused))
    assert said == [
        *("b, dropped", "c, kept", "line break, dropped", "line break, dropped"),
        *("H, prompt", "line break, dropped", "b, dropped"),
    ]
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "line break, dropped"
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") in ("A", "SUMMARY")
    assert browser_page.errors == []


def test_arms_one_at_a_time_and_links_to_samples(browser_page: BrowserPage, small: Path) -> None:
    page = browser_page.open(small)
    assert page.locator("main h2:visible").all_inner_texts() == ["Arm cleaning"]
    page.locator(".arms a", has_text="other").click()
    assert page.locator("main h2:visible").all_inner_texts() == ["Arm other"]
    assert page.locator(".arms a[aria-current]").all_inner_texts() == ["other"]
    assert status(page) == "2 of 2 samples match; 1 to 2 below"
    # without scores there is nothing to order by
    orders = page.locator("#other-order option").all_inner_texts()
    assert "largest score first" not in orders
    also = page.locator("article:visible summary").first
    assert also.inner_text() == "also shown in 1 other arm"
    also.click()
    page.locator("article:visible details a", has_text="cleaning").click()
    assert page.locator("main h2:visible").all_inner_texts() == ["Arm cleaning"]
    assert page.locator("article.chosen h4").all_inner_texts() == ["one"]
    # a link to a token clears the filters that hide its sample
    page.get_by_label("text or id contains").first.fill("xyz")
    page.goto(small.as_uri() + "#cleaning/sample/three/5")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "g, dropped"
    page.goto(small.as_uri() + "#cleaning/sample/nobody")
    assert status(page) == "The sample nobody is not among the 4 in this page."
    assert browser_page.errors == []


def test_pages_of_samples(browser_page: BrowserPage, tmp_path: Path) -> None:
    rows = [sample(f"s{i:02}", "red", "Hi?", "abcd", "1000") for i in range(23)]
    tokenizer = character_tokenizer()
    build(tmp_path / "page.html", [write_pool(tmp_path / "x", rows, tokenizer)], tokenizer)
    page = browser_page.open(tmp_path / "page.html")
    back, forth = (page.get_by_role("button", name=name) for name in ("Previous", "Next"))
    assert back.is_disabled()
    forth.click()
    forth.click()
    assert shown(page) == ["s20", "s21", "s22"]
    assert status(page) == "23 of 23 samples match; 21 to 23 below"
    assert forth.is_disabled()
    back.click()
    assert shown(page)[0] == "s10"
    page.goto((tmp_path / "page.html").as_uri() + "#x/sample/s07/4")
    assert status(page) == "23 of 23 samples match; 1 to 10 below"
    # up goes to the nearest dropped token before, not to the first
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == "c"
    assert page.locator("article.chosen .t[tabindex='0']").count() == 1
    assert browser_page.errors == []


def hostile_page(tmp_path: Path) -> Path:
    """Ids, sources, texts, reasons, arms and tokens that would do harm if they could."""
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.add_tokens(["<script>alert(7)</script>", "</script>", "<!--"])

    def row(i: int, text: str) -> dict[str, Any]:
        n = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return sample(
            f"{i} {text}", text, text, text, "0" * n, [2.0] * n, [3.0] * n, reasons=[9] * n
        )

    rows = [row(i, text) for i, text in enumerate(HOSTILE)]
    rows.append(row(97, "<!-- </script><script>alert(7)</script>"))
    rows.append(sample("empty", "plain", "words " * 17_000, "", ""))
    rows.append(row(98, "w" * 10_000))
    rows.append(row(99, "שלום עולם \U0001f469\u200d\U0001f680 é"))
    name = "x<script>alert(8)"
    arm = write_pool(tmp_path / name, rows, tokenizer, reasons={"9": HOSTILE[3]}, cut=0.5)
    table = Table(HOSTILE[0], HOSTILE[1], ["token", *HOSTILE], [["w" * 10_000, *HOSTILE]], HOSTILE)
    sections = [Section(HOSTILE[3], HOSTILE[2], HOSTILE, [table], [Drawing(*HOSTILE[:4])])]
    build(tmp_path / "page.html", [arm], tokenizer, {name: sections})
    return tmp_path / "page.html"


def test_hostile_data_is_shown_and_does_nothing(browser_page: BrowserPage, tmp_path: Path) -> None:
    page = browser_page.open(hostile_page(tmp_path))
    ids = page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).texts.map(t => t.id)"
    )
    assert set(ids) >= {f"{i} {text}" for i, text in enumerate(HOSTILE)}
    texts = []
    while True:
        for article in page.locator("article").all():
            article.locator(".t").last.focus()
            texts.append(article.locator(".text").inner_text())
        assert page.evaluate("document.documentElement.scrollWidth") == 1280
        if page.get_by_role("button", name="Next").is_disabled():
            break
        page.get_by_role("button", name="Next").click()
    both = "".join(texts)
    assert HOSTILE[0] * 2 in both and HOSTILE[1] * 2 in both and HOSTILE[3] * 2 in both
    assert "<!-- </script><script>alert(7)</script>" in both
    # turned round by nothing, and named
    assert "U+202EU+200FabcU+2066" in both
    assert not re.search("[\u202e\u200f\u2066\x1b\x00]", both)
    assert "U+0000U+0007U+001B[31mU+2028U+FEFF" in both
    assert "שלום עולם \U0001f469\u200d\U0001f680 é" in both
    assert page.locator("main script, main img").count() == 0
    page.get_by_label("source").select_option(label="${alert(4)} {{alert(5)}} javascript:alert(6)")
    assert len(shown(page)) == 1
    page.locator("[id$=-doubts] a").first.click()
    assert page.locator("article.chosen").count() == 1
    assert browser_page.errors == []


def test_on_a_narrow_screen_only_boxes_scroll(browser_page: BrowserPage, tmp_path: Path) -> None:
    file = hostile_page(tmp_path)
    browser_page.page.set_viewport_size({"width": 360, "height": 780})
    page = browser_page.open(file)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    box = page.locator(".scroll").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth && e.tabIndex === 0")
    # low on the screen, where the tip is going to be
    page.locator("article .t.dropped").first.evaluate(
        "e => { scrollTo(0, scrollY + e.getBoundingClientRect().top - 700);"
        " e.focus({ preventScroll: true }); }"
    )
    tip_box = page.locator("#tip").bounding_box()
    token_box = page.locator("article .t.dropped").first.bounding_box()
    assert tip_box["x"] >= 0 and tip_box["x"] + tip_box["width"] <= 360
    assert token_box["y"] + token_box["height"] <= tip_box["y"]
    assert browser_page.errors == []


def test_injected_script_does_not_run(browser_page: BrowserPage, small: Path) -> None:
    # as if escaping had failed somewhere
    html = small.read_text(encoding="utf-8")
    broken = small.with_name("broken.html")
    attack = "<script>window.ran = 1</script><img src='x:' onerror='window.ran = 2'>"
    broken.write_text(html.replace("<main", f"{attack}<main"), encoding="utf-8")
    page = browser_page.open(broken)
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in error for error in browser_page.errors)


def test_without_script_everything_but_the_samples_is_there(browser: Any, tmp_path: Path) -> None:
    rows = [sample("one", "red", "Hi?", "ab", "10", [2.0, 3.0], [1.0, 4.0])]
    tokenizer = character_tokenizer()
    arms = [write_pool(tmp_path / name, rows, tokenizer) for name in ("x", "y")]
    table = Table("t", "Kept", ["source", "share"], [["red", 0.5]])
    sections = [Section("s", "Totals", [], [table])]
    build(tmp_path / "page.html", arms, tokenizer, dict.fromkeys("xy", sections))
    context = browser.new_context(java_script_enabled=False, offline=True)
    try:
        page = context.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        assert page.locator("main h2:visible").all_inner_texts() == ["Arm x", "Arm y"]
        assert page.locator("caption:visible", has_text="Kept").count() == 2
        assert page.get_by_text("The samples need JavaScript").count() == 2
        assert page.locator(".context b:visible").first.inner_text() == "b"
    finally:
        context.close()


def test_headings_tables_and_controls_have_names(browser_page: BrowserPage, small: Path) -> None:
    page = browser_page.open(small)
    levels = page.evaluate(
        "[...document.querySelectorAll('main :is(h1,h2,h3,h4)')].filter(e => e.checkVisibility())"
        ".map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.locator("main").count() == page.locator("nav[aria-label]").count() == 1
    assert page.evaluate(
        "[...document.querySelectorAll('input, select')].every(e => e.labels.length "
        "|| e.getAttribute('aria-label'))"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.caption "
        "&& [...t.querySelectorAll('th')].every(h => h.scope))"
    )
    identifiers = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(identifiers) == len(set(identifiers))


def evolving(tmp_path: Path) -> Path:
    """Two rounds after D_0 in one arm; the other keeps everything and comes first."""
    tokenizer = character_tokenizer()
    rows = [
        sample("d0", "red", "Hi?", "ab", "11", round=0, truth=[1, 1]),
        sample("r1", "red", "Hi?", "bcdef", "11011", [2.0, 2.0, 1.53125, 2.0, 2.0],
               [1.0, 1.0, 1.5, 1.0, 1.0], round=1, truth=[1, 1, 1, 0, 1]),
        # x is known to both models; y, below another cut, is not
        sample("r2", "blue", "Hi?", "xyz", "001", [0.0625, 3.0, 1.0], [0.09375, 3.25, 0.5],
               round=2, truth=[1, -1, 0]),
        sample("r3", "blue", "Hi?", "^", "0", [4.0], [6.0], round=2, truth=[1]),
    ]  # fmt: skip
    facts = {
        "rounds": [{"cut": None}, {"cut": 0.0625}, {"cut": 0.125}], "cut": None,
        "schedule": "self_evolving", "eos_id": ord("z") - 31,
    }  # fmt: skip
    whole = [{**row, "kept": "1" * len(row["kept"]), "round": 1} for row in rows]
    arms = [
        write_pool(tmp_path / "full", whole, tokenizer),
        write_pool(tmp_path / "evolving", rows, tokenizer, **facts),
    ]
    build(tmp_path / "page.html", arms, tokenizer)
    return tmp_path / "page.html"


def test_rows_that_were_not_cleaned_are_told_apart(
    browser_page: BrowserPage, tmp_path: Path
) -> None:
    page = browser_page.open(evolving(tmp_path))
    # the first arm that something was cut in by score, not the first
    assert page.locator("main h2:visible").all_inner_texts() == ["Arm evolving"]
    assert shown(page) == ["d0", "r1", "r2", "r3"]
    head = page.locator("article:visible .head").first.inner_text()
    assert "D_0, not cleaned" in head and "all 2 response tokens carry loss" in head
    assert "100.0 %" not in head
    page.get_by_label("kept share from, percent").last.fill("1")
    assert shown(page) == ["r1", "r2"]
    page.get_by_label("kept share from, percent").last.fill("0")
    choice = page.get_by_label("cleaned in")
    assert choice.locator("option").all_inner_texts() == [
        "all", "D_0, not cleaned", "round 1", "round 2",
    ]  # fmt: skip
    choice.select_option(label="D_0, not cleaned")
    assert shown(page) == ["d0"]
    choice.select_option(label="round 2")
    assert shown(page) == ["r2", "r3"]
    # -0.03125 halves away from zero
    assert "scores −0.250 to 0.500" in page.locator("article:visible .head").first.inner_text()
    page.locator("article:visible").first.locator(".t", has_text="y").hover()
    assert tip(page)["round"] == "2"
    assert tip(page)["cut"] == "0.12500"
    page.locator(".arms a", has_text="full").click()
    assert "round" not in page.locator("article:visible .head").first.inner_text()
    assert page.locator("#full select").count() == 2
    assert browser_page.errors == []


def test_lists_and_tips_give_the_same_numbers(browser_page: BrowserPage, tmp_path: Path) -> None:
    page = browser_page.open(evolving(tmp_path))
    lists = page.locator("#evolving-doubts table")
    near = lists.filter(has_text="Just below the cut")
    assert near.locator("thead th").all_inner_texts() == [
        "token (framed), in its context", "base loss", "reference loss", "score", "cut", "round",
        "sample", "source",
    ]  # fmt: skip
    cells = [row.locator("td").all_inner_texts() for row in near.locator("tbody tr").all()]
    # 0.03125 below a cut of 0.0625, 0.375 and 2.125 below 0.125; x, known to both, is left out
    assert cells == [
        ["1.5313", "1.5000", "0.03125", "0.06250", "1", "r1", "red"],
        ["3.0000", "3.2500", "−0.25000", "0.12500", "2", "r2", "blue"],
        ["4.0000", "6.0000", "−2.00000", "0.12500", "2", "r3", "blue"],
    ]
    near.locator("a", has_text="r1").click()
    said = tip(page)
    assert said["base loss"] == "1.5313 nats" and said["score"].startswith("0.03125 ")
    assert said["position"] == "token 6 of 8 of the sample"
    assert page.url.endswith("#evolving/sample/r1/6")
    # legible: framed, not struck through, in one piece; the tip likewise
    style = "e => [getComputedStyle(e).textDecorationLine, getComputedStyle(e).whiteSpaceCollapse]"
    framed = near.locator(".framed")
    assert [e.evaluate(style) for e in framed.all()] == [["none", "preserve"]] * 3
    assert near.locator("b").all_inner_texts() == ["d", "y", "^"]
    assert browser_page.errors == []


def test_the_first_doubts_say_what_and_why(tmp_path: Path) -> None:
    html = evolving(tmp_path).read_text(encoding="utf-8")
    [box] = re.findall(r"<dt>Look wrong</dt><dd>(.*?)</dd>", html, flags=re.S)
    plain = re.sub(r"<[^>]*>", "", box)
    # `^` has the highest loss, but tells a reader nothing
    assert [line.partition("</li>")[0] for line in box.split("<b>")[1:]] == [
        'd</b></span><span class="t kept">e</span><span class="t kept">f</span></span><br>'
        '<a href="#evolving/sample/r1/6">r1</a>: base loss 1.5313, reference loss 1.5000, score '
        "0.03125, cut 0.06250; informative by planted truth",
        'x</b></span><span class="t dropped">y</span><span class="t kept">z</span></span><br>'
        '<a href="#evolving/sample/r2/4">r2</a>: base loss 0.0625, reference loss 0.0938, score '
        "−0.03125, cut 0.12500; informative by planted truth",
    ]
    assert plain.startswith("Informative by planted truth, and dropped (framed; more, and why):")


def test_halves_are_rounded_away_from_zero() -> None:
    assert [decimal(n, 4) for n in (3125, -3125, 3124, 4, -4, 123456789, None)] == [
        "0.0313", "−0.0313", "0.0312", "0.0000", "0.0000", "1234.5679", "–",
    ]  # fmt: skip
    assert decimal(-12, 5) == "−0.00012"


def test_a_link_shows_its_token_whatever_lies_under_the_pointer(
    browser_page: BrowserPage, tmp_path: Path
) -> None:
    letters = "abcdefghijkl"
    rows = [
        sample(f"s{i:02}", "red", "Hi?", "o" * 700 + letters[i] + "oo", "1" * 700 + "011",
               [1.0] * 700 + [5.0, 1.0, 1.0], [0.5] * 700 + [6.0, 0.5, 0.5])
        for i in range(12)
    ]  # fmt: skip
    tokenizer = character_tokenizer()
    build(tmp_path / "page.html", [write_pool(tmp_path / "x", rows, tokenizer)], tokenizer)
    page = browser_page.open(tmp_path / "page.html")
    links = page.locator("#x-doubts a")
    for i in (0, 11):
        # where the sample's text is going to be
        links.nth(i).evaluate("e => scrollTo(0, scrollY + e.getBoundingClientRect().top - 250)")
        links.nth(i).click()
        page.wait_for_timeout(250)
        assert page.locator("#tip .what").inner_text() == letters[i]
        assert page.locator(".t.at").inner_text() == letters[i]
    # the pointer shows others when it moves, and the linked one when it has left
    page.locator("article.chosen .t").last.hover()
    assert page.locator("#tip .what").inner_text() == "o"
    page.mouse.move(3, 3)
    page.locator("#tip .what", has_text="l").wait_for()
    assert browser_page.errors == []


def test_what_became_of_an_arm(tmp_path: Path) -> None:
    evolving(tmp_path)
    arm = CleanedArm("evolving", tmp_path / "evolving", tmp_path / "evolving" / "cleaned")
    results = [
        {"name": name, "kept_share": None, "validation_nll": {"all": loss}, "mask": {},
         "accuracy": {"all": {"correct": right, "questions": 200}}}
        for name, right, loss in (("base", 100, 3.0), ("evolving", 25, 1.25), ("full", 120, 1.0))
    ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "arms").symlink_to(tmp_path)
    run = FinishedRun(tmp_path)
    found = dict(facts(run, arm, draw(arm), {}))
    assert found["Reached"] == (
        "Its model answers 12.5 % of 200 test questions right (base: 50.0 %, full: 60.0 %). "
        "Validation loss 1.250 nats per response token (base: 3.000, full: 1.000)."
    )
    assert found["Left"] == (
        "1 of 1 end of responses (100.0 %) kept; 1 of 3 samples (33.3 %) with no token that "
        "carries loss."
    )
    # nine ranked, informative: b c d f x ^, kept of them b c f; kept e and z besides
    assert found["Planted truth"] == (
        "60.0 % of the kept tokens are informative (of all ranked: 66.7 %). Kept are 50.0 % of "
        "the informative and 0.0 % of the corrupted."
    )
    assert "Reasons" not in found and "Never kept" not in found


def test_why_tokens_were_dropped_and_which_are_never_kept(tmp_path: Path) -> None:
    rows = [
        sample(f"s{i}", "a", "?", "abc", "101", reasons=[0, 8 if i else 9, 0]) for i in range(20)
    ]
    rows.append(sample("last", "a", "?", "d" * 19 + "a", "0" * 20, reasons=[8] * 20))
    reasons = {"0": "kept", "1": "prompt", "8": "task relevance", "9": "novelty"}
    arm = write_pool(tmp_path / "arm", rows, character_tokenizer(), reasons=reasons)
    found = dict(facts(FinishedRun(arm.folder), arm, draw(arm), {}))
    # 40 dropped: b twenty times, once for novelty; d is too rare; a was kept before
    assert found["Reasons"] == (
        "97.5 % of the dropped for task relevance (39); 2.5 % of the dropped for novelty (1)."
    )
    assert found["Never kept"] == (
        "1 of the 3 vocabulary entries that occur at least 20 times; they hold 50.0 % of the "
        "dropped tokens."
    )


def test_samples_that_are_not_in_the_page_are_counted(
    browser_page: BrowserPage, tmp_path: Path
) -> None:
    rows = [sample(f"s{i:02}", "red", "Hi?", "abcd", "1000") for i in range(23)]
    tokenizer = character_tokenizer()
    arm = write_pool(tmp_path / "x", rows, tokenizer)
    build(tmp_path / "page.html", [arm], tokenizer, limit=3)
    page = browser_page.open(tmp_path / "page.html")
    more = "20 more are not in this page; `tokenclean show` prints any."
    assert status(page) == f"3 of 3 samples shown match; 1 to 3 below. {more}"
    page.get_by_label("text or id contains").fill("nothing like it")
    assert status(page) == f"0 of 3 samples shown match. {more}"
    # this arm has neither lists nor scores to have chosen by
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Showing 3 of 23 samples: in turn" in html


def test_files_beside_the_page_open_beside_it() -> None:
    html = fragments.table(Table("t", "T", ["a"], [["x"]]), "t0") + fragments.figure(
        Drawing("f", "F", "C.", "A."), None
    )
    links = re.findall(r"<a ([^>]*)>", html)
    assert len(links) == 5
    assert all('target="_blank" rel="noopener"' in link for link in links)


def test_long_tables_are_folded(browser_page: BrowserPage, tmp_path: Path) -> None:
    tables = [
        Table(f"t{n}", f"Of {n}", header, [[f"r{i}", i] for i in range(n)])
        for n, header in ((12, ["a", "b"]), (13, ["a", "b"]), (14, ["setting", "value"]))
    ]
    rows = [sample("one", "red", "Hi?", "ab", "10")]
    tokenizer = character_tokenizer()
    arm = write_pool(tmp_path / "x", rows, tokenizer)
    build(tmp_path / "page.html", [arm], tokenizer, {"x": [Section("s", "S", [], tables)]})
    page = browser_page.open(tmp_path / "page.html")

    def lines() -> list[int]:
        found = page.locator("#x table").all()
        return [t.locator("tbody tr:visible").count() for t in found if t.is_visible()]

    assert lines() == [12, 10, 14]
    more = page.get_by_text("3 more rows")
    more.click()
    assert lines() == [12, 13, 14]
    more.click()
    page.emulate_media(media="print")
    assert lines() == [12, 13, 14]
    assert not more.is_visible()


def test_words_are_explained(browser_page: BrowserPage, small: Path) -> None:
    page = browser_page.open(small)
    meaning = page.locator("#words dd").first
    assert not meaning.is_visible()
    page.goto(small.as_uri() + "#words")
    assert meaning.is_visible()
    words = " ".join(page.locator("#words dt").all_inner_texts())
    for word in (
        "D_0",
        "theta_0",
        "warm-up",
        "nats",
        "weighting",
        "unlearnt",
        "RHO",
        "fingerprint",
    ):
        assert word in words
    assert browser_page.errors == []


def test_on_a_phone(browser: Any, tmp_path: Path) -> None:
    rows = [
        sample(f"s{i}", "red", "Hi?", "words and more " * 30, "10" * 225, [2.0] * 450, [1.0] * 450)
        for i in range(3)
    ]
    tokenizer = character_tokenizer()
    arm = write_pool(tmp_path / "x", rows, tokenizer)
    header = ["name", *(f"a long heading {i}" for i in range(8))]
    table = Table("t", "Wide", header, [["row", *range(8)]])
    build(tmp_path / "page.html", [arm], tokenizer, {"x": [Section("s", "S", [], [table])]})
    context = browser.new_context(
        viewport={"width": 360, "height": 780}, has_touch=True, is_mobile=True, offline=True
    )
    try:
        page = context.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        box = page.locator(".scroll").first
        assert "more" in box.get_attribute("class")
        cue = "e => getComputedStyle(e, '::before').content"
        assert "sideways" in page.locator(".scroll + .note").first.evaluate(cue)
        box.evaluate("e => e.scrollTo(e.scrollWidth, 0)")
        page.wait_for_function("!document.querySelector('.scroll').classList.contains('more')")
        # the name of the row stays in sight
        name = box.locator("tbody th").bounding_box()
        assert name["x"] == box.bounding_box()["x"]
        # the last token of the page, low on the screen
        token = page.locator("article").last.locator(".t").last
        token.scroll_into_view_if_needed()
        token.tap()
        box_of_tip = page.locator("#tip").bounding_box()
        at = token.bounding_box()
        assert at["y"] + at["height"] <= box_of_tip["y"]
        page.get_by_label("Close").tap()
        assert not page.locator("#tip").is_visible()
        token.tap()
        assert page.locator("#tip").is_visible()
        page.goto((tmp_path / "page.html").as_uri() + "#x-0")
        page.locator("#tip").wait_for(state="hidden")
    finally:
        context.close()


def test_no_two_places_of_a_page_have_one_name(tmp_path: Path) -> None:
    """Names of arms that look like those of the parts of another arm's section."""
    run = planted_run(tmp_path / "run")
    (run / "arms" / "one").rename(run / "arms" / "a")
    (run / "arms" / "two").rename(run / "arms" / "a-1")
    shutil.copytree(run / "arms" / "a", run / "arms" / "run-0")
    report([str(run), "--tokenizer", str(BASE)])
    html = (run / "report" / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'\sid="([^"]+)"', html)
    assert len(found) == len(set(found)) > 30


def test_somebody_elses_report_is_not_replaced(tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run")
    (run / "report").mkdir()
    (run / "report" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="holds no report of ours"):
        report([str(run), "--tokenizer", str(BASE)])
    assert (run / "report" / "notes.md").read_text() == "mine"


def test_a_run_with_arms_missing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planted_run(tmp_path / "run")
    arms = {name: {"schedule": "fixed_model"} for name in ("one", "two", "three")}
    (run / "config.yaml").write_text(json.dumps({"loop": {"arms": arms}}), encoding="utf-8")
    report([str(run), "--tokenizer", str(BASE)])
    html = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "The run is not finished; arms left out: three." in html
    assert "not finished, and so left out: three" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"rule": "token_cleaning", "scope": "sample"}, "every sample has its own"),
        ({"rule": "token_cleaning", "scope": "whole_sample"}, "ranked by their mean score"),
        ({"rule": "perplexity", "scope": "sample"}, "perplexity does not rank the pool by it"),
    ],
)
def test_rules_without_one_cut_say_why(selection: dict[str, str], words: str) -> None:
    arm = SimpleNamespace(manifest={"selection": selection, "cut": None})
    assert words in _cut(arm)  # type: ignore[arg-type]
