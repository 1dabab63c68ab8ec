"""`tokenclean report RUN`: what a run cleaned, one page with its figures and numbers beside it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from tokenclean.data.cleaned import read_blocks
from tokenclean.finished import ONLY, CleanedArm, FinishedRun
from tokenclean.publish import complete_folder
from tokenclean.report.content import Section
from tokenclean.report.embedded import Texts, embed
from tokenclean.report.glance import facts
from tokenclean.report.page import MAX_BYTES, SAMPLE_BYTES, ArmPart, write_page
from tokenclean.report.plain import markdown, visible
from tokenclean.report.samples import Draw

#: Folder of a run's report.
REPORT: Final = "report"
PAGE: Final = "report.html"
#: Samples of an arm in the page, if their texts leave room for so many.
SAMPLES: Final = 400


def report(argv: list[str]) -> None:
    """Write the report of a finished run."""
    parser = ArgumentParser(
        prog="tokenclean report",
        description="What a run cleaned: report/report.html in its folder, one file that opens "
        "without a network; figures and numbers beside it.",
    )
    parser.add_argument(
        "run", type=Path, help="folder of a run of `clean` or `select`, an arm, a cleaned pool"
    )
    parser.add_argument("--arm", action="append", help="this arm (may be repeated; default: all)")
    parser.add_argument("--tokenizer", help="of the pool, where the run does not name it")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the tokenizer"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="samples of an arm to show, at most (default: %(default)s)",
    )
    parser.add_argument("--text", action="store_true", help="print the tables as well, as Markdown")
    options = parser.parse_args(argv)
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: show one at least")
    run = FinishedRun(options.run, options.tokenizer, options.trust_remote_code)
    if options.arm:
        chosen = {name: run.arm(name) for name in options.arm}
        run.arms = {name: arm for name, arm in run.arms.items() if name in chosen}
    page, text = write_report(run, options.samples)
    if options.text:
        # a log may be in an encoding that lacks some signs
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        print(text)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")


def write_report(
    run: FinishedRun, limit: int = SAMPLES, max_bytes: int = MAX_BYTES
) -> tuple[Path, str]:
    """Write ``report/`` into a run's folder; an older one is replaced when it is complete.

    Args:
        run: with the arms to report.
        limit: samples of an arm, at most.
        max_bytes: of the page.

    Returns:
        Its page, and its tables as Markdown.

    Raises:
        ValueError: if the run's tokenizer is not known, or ``report`` is something else.
    """
    # matplotlib, and refusals before the long work
    from tokenclean.report.board import write_board
    from tokenclean.report.rounds import round_scalars
    from tokenclean.report.sections import run_sections, sections

    tokenizer = run.tokenizer
    folder = run.folder / REPORT
    if folder.exists() and not (folder / PAGE).is_file():
        raise ValueError(f"{folder} is there and holds no report of ours; move it away")
    if run.unfinished:
        _progress(f"not finished, and so left out: {', '.join(map(visible, run.unfinished))}")
    with complete_folder(folder, sealed=False) as partial:
        whole = run_sections(run, partial)
        texts = Texts(tokenizer)
        draws: dict[str, Draw] = {}
        of_arms: dict[str, list[Section]] = {}
        for i, (name, arm) in enumerate(run.arms.items(), start=1):
            _progress(f"{visible(name)} ({i} of {len(run.arms)})")
            draws[name] = draw_samples(arm, limit)
            of_arms[name] = sections(run, arm, partial)
        _progress("samples and page")
        shown = embed(draws, texts, min(SAMPLE_BYTES, max_bytes // 3))
        parts = [
            ArmPart(
                draw,
                facts(run, draw.arm, draw, round_scalars(run, draw.arm) if draw.arm.rounds else {}),
                of_arms[name],
                shown[name],
            )
            for name, draw in draws.items()
        ]
        left_out = write_page(
            partial / PAGE, _title(run), _lead(run, parts), whole, parts, texts, max_bytes
        )
        if left_out:
            _progress(f"{len(left_out)} figures are beside the page only, to keep it small")
        _progress("TensorBoard")
        write_board(run, partial / "tensorboard")
    text = markdown(whole) + "\n".join(_plain(part, len(parts) > 1) for part in parts)
    return folder / PAGE, text


def draw_samples(arm: CleanedArm, limit: int) -> Draw:
    """What to show of an arm; reads its pool once."""
    draw = Draw(arm, limit)
    for block in read_blocks(arm.cleaned):
        draw.add(block)
    return draw


def _title(run: FinishedRun) -> str:
    parts = run.folder.resolve().parts
    # runs of studies are called alike, seed_0 and so on
    if "outputs" in parts[:-1]:
        return f"What {'/'.join(parts[parts.index('outputs') + 1 :])} cleaned"
    return f"What {parts[-1]} cleaned"


def _lead(run: FinishedRun, parts: Sequence[ArmPart]) -> list[str]:
    """Where this comes from, and what there is to see."""
    data = run.config.get("data") or {}
    pool = data.get("path") or run.config.get("pool")
    text = "Token-level cleaning: every response token is kept, and trains the model, or is dropped"
    lead = [f"{text}, and stays in the context without loss."]
    if any(part.draw.fate.unlearnt for part in parts):
        lead[0] += " Some dropped tokens have a negative weight and are unlearnt."
    if run.unfinished:
        lead.append(f"The run is not finished; arms left out: {', '.join(run.unfinished)}.")
    from_what = f"The pool: {pool}. " if pool else ""
    if len(parts) > 1:
        lead.append(
            f"{from_what}{len(parts)} arms cleaned it; the contents list them, and one is shown at "
            "a time."
        )
    elif from_what:
        lead.append(from_what.strip())
    return lead


def _plain(part: ArmPart, named: bool) -> str:
    """An arm's part of the text."""
    name = f" of {part.name}" if named or part.name != ONLY else ""
    first = Section("facts", f"At a glance{name}", [f"{q}: {a}" for q, a in part.facts])
    return markdown([first]) + "\n" + markdown(part.sections, level=3)


def _progress(text: str) -> None:
    print(f"report: {text}", file=sys.stderr, flush=True)
