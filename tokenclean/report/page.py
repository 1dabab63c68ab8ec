"""The report's page: one HTML file that needs no network, of bounded size.

Styles, script, figures and samples are in it. Its Content-Security-Policy names the script and the
styles by their hashes, so that nothing else runs or is loaded, whatever the data holds.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenclean.report import fragments
from tokenclean.report.content import Drawing, Section
from tokenclean.report.doubted import doubts, first_doubts
from tokenclean.report.doubts import DOUBTS, Doubts
from tokenclean.report.embedded import UNITS, Texts, script_json, sources_of, whole
from tokenclean.report.glossary import WORDS
from tokenclean.report.samples import Draw, cut_of

#: Of the whole page, its samples among it.
MAX_BYTES: Final = 9_500_000
SAMPLE_BYTES: Final = 3_000_000
#: Pixels of a figure's file for one of the page: figures are drawn at 150 dots per inch.
_DENSITY: Final = 1.6
#: Colours of a figure in the page: curves need few, a density map looks the same with these.
_COLOURS: Final = 128
_ASSETS: Final = "assets"


@dataclass
class ArmPart:
    """An arm's part of the page.

    Attributes:
        draw: its samples and doubts.
        facts: its first lines, question and answer in plain text.
        sections: see `tokenclean.report.content`.
        rows: its samples, from `tokenclean.report.embedded.embed`.
    """

    draw: Draw
    facts: list[tuple[str, str]]
    sections: list[Section]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.draw.arm.name

    @property
    def numbers(self) -> set[int]:
        """Of the rows that the page has."""
        return {row["number"] for row in self.rows}

    @property
    def doubts(self) -> list[Doubts]:
        """Those with a token in them."""
        return [doubts for doubts in self.draw.doubts.lists.values() if doubts.found]


def write_page(
    path: Path,
    title: str,
    lead: Sequence[str],
    whole: Sequence[Section],
    parts: Sequence[ArmPart],
    texts: Texts,
    max_bytes: int = MAX_BYTES,
) -> list[str]:
    """Write the page.

    Args:
        path: of the HTML; figures are read from ``figures/`` beside it.
        title: of the page.
        lead: paragraphs before everything else.
        whole: sections on the run as a whole.
        parts: of the arms.
        texts: what the samples of all arms read as.
        max_bytes: of the page. Figures that do not fit are left out, as the page says in their
            places; those of later sections before those of earlier ones.

    Returns:
        Names of the figures left out.
    """
    taken = {"data", "tip", "tip-facts", "main", "run", "words"}
    places = [fragments.slug(part.name, taken) for part in parts]
    names = [_drawings(whole), *(_drawings(part.sections) for part in parts)]
    frame = _Frame(title, lead, whole, parts, places, texts)
    # with every figure left out, that is, with the words that would stand in its place
    room = max_bytes - len(frame.html({}).encode("utf-8"))
    images: dict[str, tuple[str, int, int]] = {}
    left_out: list[str] = []
    # the run's own first, then the first of each arm, the second of each arm, ...
    turns = [*names[0], *(d for turn in zip_longest(*names[1:]) for d in turn if d is not None)]
    for drawing in turns:
        file = path.parent / "figures" / f"{drawing.name}.png"
        image = inline_image(file) if file.is_file() else None
        if image is None or len(image[0]) + 64 > room:
            left_out.append(drawing.name)
            continue
        room -= len(image[0]) + 64
        images[drawing.name] = image
    path.write_bytes(frame.html(images).encode("utf-8"))
    return left_out


def inline_image(path: Path) -> tuple[str, int, int]:
    """A PNG with few colours as a data URI, and its width and height on the page in pixels."""
    from PIL import Image

    before = path.read_bytes()
    with Image.open(io.BytesIO(before)) as image:
        width, height = image.size
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    buffer = io.BytesIO()
    flat.quantize(_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    smaller = min(buffer.getvalue(), before, key=len)
    uri = "data:image/png;base64," + base64.b64encode(smaller).decode("ascii")
    return uri, round(width / _DENSITY), round(height / _DENSITY)


def _drawings(sections: Sequence[Section]) -> list[Drawing]:
    return [drawing for section in sections for drawing in section.drawings]


@dataclass
class _Frame:
    """Everything of the page but its figures."""

    title: str
    lead: Sequence[str]
    whole: Sequence[Section]
    parts: Sequence[ArmPart]
    places: Sequence[str]
    texts: Texts

    def html(self, images: Mapping[str, tuple[str, int, int]]) -> str:
        style, script = asset("page.css"), asset("page.js")
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
            f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
        )
        lead = "".join(f'<p class="lead">{fragments.text(p)}</p>' for p in self.lead) + _FILES
        # what is asked first stands first; of several arms there is a table of them
        alone = len(self.parts) == 1
        first = self._facts(self.parts[0], self.places[0]) if alone else ""
        whole = "".join(_section(s, f"run-{i}", images) for i, s in enumerate(self.whole))
        arms = "".join(
            self._arm(i, part, place, images)
            for i, (part, place) in enumerate(zip(self.parts, self.places, strict=True))
        )
        title = fragments.attribute(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
            '<a class="skip" href="#main">Skip to the report</a>\n<div class="frame">\n'
            f'<nav class="contents" aria-label="Contents">{self._contents()}</nav>\n'
            f'<main id="main" tabindex="-1">\n<h1>{fragments.text(self.title)}</h1>{lead}\n'
            f"{first}{whole}\n{arms}{_words()}\n</main>\n</div>\n"
            f'<script type="application/json" id="data">{script_json(self._data())}</script>\n'
            f"<script>{script}</script>\n</body>\n</html>\n"
        )

    def _contents(self) -> str:
        found = ""
        if self.whole:
            links = "".join(_link(f"run-{i}", s.title) for i, s in enumerate(self.whole))
            found += f"<h2>This run</h2><ul>{links}{_link('words', 'Words used')}</ul>"
        if len(self.parts) > 1:
            links = "".join(
                _link(place, part.name) for part, place in zip(self.parts, self.places, strict=True)
            )
            found += f'<h2>Arms</h2><ul class="arms">{links}</ul>'
        for part, place in zip(self.parts, self.places, strict=True):
            links = "".join(
                _link(f"{place}-{key}", title)
                for key, title in (
                    *((i, s.title) for i, s in enumerate(part.sections)),
                    *([("doubts", "Doubtful drops")] if part.doubts else []),
                    ("samples", "Samples"),
                )
            )
            found += (
                f'<div id="{place}-contents"><h2 class="name">{fragments.text(part.name)}</h2>'
                f"<ul>{links}</ul></div>"
            )
        return found

    def _arm(
        self, index: int, part: ArmPart, place: str, images: Mapping[str, tuple[str, int, int]]
    ) -> str:
        facts = "" if len(self.parts) == 1 else self._facts(part, place)
        sections = "".join(_section(s, f"{place}-{i}", images) for i, s in enumerate(part.sections))
        return (
            f'<section id="{place}" data-arm="{index}" aria-labelledby="{place}-title">'
            f'<h2 id="{place}-title">Arm {fragments.text(part.name)}</h2>{facts}'
            f"{sections}{self._doubts(part, place)}{self._samples(part, place)}</section>\n"
        )

    def _facts(self, part: ArmPart, place: str) -> str:
        said = [(q, fragments.text(a)) for q, a in part.facts]
        if part.doubts:
            few = first_doubts(part.doubts, place, self.texts, part.numbers)
            said.append(("Look wrong", few))
        return fragments.facts(said)

    def _doubts(self, part: ArmPart, place: str) -> str:
        if not part.doubts:
            return ""
        rounds = part.draw.has_uncleaned
        lists = "".join(doubts(d, place, self.texts, part.numbers, rounds) for d in part.doubts)
        return (
            f'<section id="{place}-doubts"><h3>Dropped tokens that look wrong</h3>'
            "<p>Found by what is known of each token, not by judging what it says: lists of at "
            f"most {DOUBTS} to read, not a count of mistakes. Losses in nats.</p>"
            f"{_legend(part)}{lists}</section>"
        )

    def _samples(self, part: ArmPart, place: str) -> str:
        total = part.draw.samples
        per_source = "; ".join(
            f"{source} {n:,}" for source, n in sources_of(part.rows, self.texts).items()
        )
        chosen = ["those of the lists above"] if part.doubts else []
        chosen += ["those with the largest and smallest scores"] if part.draw.has_extremes else []
        how = (
            "All samples are shown."
            if len(part.rows) == total
            else f"Showing {len(part.rows):,} of {total:,} samples: "
            f"{', '.join(chosen)}{', and then, ' if chosen else ''}in turn, samples of every "
            "source and of every kept share in it (nothing, up to a quarter, half, three "
            "quarters, less than all, all), drawn by a hash of their ids."
        )
        return (
            f'<section id="{place}-samples"><h3>Samples</h3><p>{fragments.text(how)} Per source: '
            f"{fragments.text(per_source)}.</p>{_legend(part)}"
            '<p class="note">Point at a token, or tab into a text, to see what is known of it. '
            "Arrow keys: left and right go from token to token, up and down from one dropped "
            "token to the next; Escape closes. The percentile of a value is the share of the "
            "arm&#39;s ranked response tokens with a smaller value, half of the equal ones "
            "included; values that agree to 1 in 2,000 count as equal.</p>"
            f'<div id="{place}-browser"><p class="missing">The samples need JavaScript, which is '
            "switched off here. Everything else can be read without.</p></div></section>"
        )

    def _data(self) -> dict[str, Any]:
        arms = []
        for part, place in zip(self.parts, self.places, strict=True):
            manifest = part.draw.arm.manifest
            found = {n: cut_of(manifest, n) for n in sorted(part.draw.rounds)}
            cuts = {str(n): np.array([cut]) for n, cut in found.items() if cut is not None}
            arms.append(
                {
                    "slug": place,
                    "name": part.name,
                    "reasons": manifest.get("reasons") or {},
                    "cuts": {n: whole(cut, UNITS)[0] for n, cut in cuts.items()},
                    # pools that were not cleaned in rounds say 1 for all rows
                    "rounds": part.draw.has_uncleaned,
                    "total": part.draw.samples,
                    "rows": part.rows,
                }
            )
        return {"texts": self.texts.entries, "first": _opened(self.parts), "arms": arms}


#: Said once: every table and figure has such links.
_FILES: Final = (
    '<p class="note">This page holds all that it shows and needs nothing else. Its links to .csv '
    "and .png files lead to the folders tables and figures beside it, where the report was "
    "written; if the page was passed on alone, they lead nowhere.</p>"
)


def _opened(parts: Sequence[ArmPart]) -> int:
    """The arm to open the page on: one where something happened, by its score if there is one."""
    for happened in (
        lambda part: part.draw.cuts_by_score,
        lambda part: part.draw.fate.dropped > 0,
    ):
        for i, part in enumerate(parts):
            if happened(part):
                return i
    return 0


def _words() -> str:
    """What the words of the page mean."""
    said = fragments.facts([(word, fragments.text(meaning)) for word, meaning in WORDS])
    return f'<details id="words"><summary>Words used in this report</summary>{said}</details>'


def _legend(part: ArmPart) -> str:
    """How tokens look, as far as the arm has such tokens."""
    found = [("kept", "carries loss"), ("dropped", "carries none")]
    if any(weight < 0 for row in part.rows for weight in row.get("weight", ())):
        found.append(("unlearnt", "has a negative weight"))
    found.append(("prompt", ""))
    if any("uncleaned" in row for row in part.rows):
        found.append(("uncleaned", "D_0: carries loss, not cleaned"))
    if part.draw.has_truth:
        found.append(("corrupted", "by planted truth"))
    marks = (f'<span><span class="t {kind}">{kind}</span> {says}</span>' for kind, says in found)
    return f'<p class="legend">{"".join(marks)}</p>'


def _section(content: Section, place: str, images: Mapping[str, tuple[str, int, int]]) -> str:
    tables = fragments.tables(content.tables, place)
    figures = [fragments.figure(d, images.get(d.name)) for d in content.drawings]
    return fragments.section(content, place, [tables, *figures])


def _link(place: str, name: str) -> str:
    # long names may be broken where their words meet
    shown = fragments.text(name).replace("_", "_<wbr>")
    return f'<li><a href="#{place}">{shown}</a></li>'


def asset(name: str) -> str:
    """A file of the page, as it is in the package."""
    return (resources.files(__package__) / _ASSETS / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
