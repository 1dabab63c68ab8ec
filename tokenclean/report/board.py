"""A finished run as TensorBoard event files: scalars, histograms, figures and hyper-parameters.

One TensorBoard run per arm. Written without `SummaryWriter`, which puts the clock, the machine and
a process number into names and events: here the same run gives the same bytes. Samples are left
out: the text plugin shows no colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tokenclean.data.cleaned import kept_share
from tokenclean.evaluation.planted import ALL
from tokenclean.finished import CleanedArm, FinishedRun
from tokenclean.report.rounds import round_results, round_scalars
from tokenclean.report.steps import is_ranked, ranked_blocks

#: Name of an event file; the usual one holds a time, a machine and a process number.
EVENTS: Final = "events.out.tfevents.0.tokenclean"
#: Columns of the HParams table, the same for every run, and whether they are numbers. ``level`` is
#: the scope; ``keep`` the share asked for, or the estimated one of ``auto``, where a rule ranks.
HPARAMS: Final = {
    "run": False,
    "arm": False,
    "rule": False,
    "level": False,
    "keep": True,
    "schedule": False,
    "weighting": False,
    "seed": True,
    "base": False,
}
#: What the HParams table compares: shares, and the loss in nats per response token. Scalars.
METRICS: Final = (
    "result/kept_share",
    "result/accuracy",
    "result/validation_nll",
    "result/auroc",
    "result/auroc_corrupted",
    "result/precision",
    "result/recall",
    "result/corrupted_kept",
)
#: Attribute of a block -> tag of its histograms, in nats but for ``priority``, which is in the unit
#: of what the rule goes by.
QUANTITIES: Final = {
    "base": "tokens/base_nll",
    "reference": "tokens/reference_nll",
    "score": "tokens/score",
    "priority": "tokens/priority",
}
#: Histograms have buckets of 1 / 32 up to 64 on either side of 0; what lies beyond is in the outer
#: ones.
PER_UNIT: Final = 32
_REACH: Final = 64
_LIMITS: Final = np.arange(-_REACH * PER_UNIT, _REACH * PER_UNIT + 1, dtype=np.float64) / PER_UNIT


def write_board(run: FinishedRun, folder: Path, figures: Path | None = None) -> None:
    """Event files of a run: in ``<folder>/<arm>`` for every arm, in ``<folder>`` for pictures.

    Args:
        run: finished.
        folder: TensorBoard's log folder, made if need be.
        figures: PNG files to show; by default those in ``figures`` beside the folder, if any.

    Raises:
        ValueError: if a PNG is none.
    """
    for name, arm in run.arms.items():
        write_events(folder / name, _of_arm(run, arm))
    pictures = sorted((figures or folder.parent / "figures").glob("*.png"))
    if pictures:
        write_events(folder, (_event(_image(path)) for path in pictures))


def write_events(folder: Path, events: Iterable[Event]) -> None:
    """An event file, in place of the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EVENTS).open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=0, file_version="brain.Event:2").SerializeToString())
        for event in events:
            writer.write(event.SerializeToString())


def _event(value: Summary.Value, step: int = 0) -> Event:
    return Event(wall_time=0, step=step, summary=Summary(value=[value]))


def _scalar(tag: str, value: float) -> Summary.Value:
    return Summary.Value(tag=tag, simple_value=value)


def _of_arm(run: FinishedRun, arm: CleanedArm) -> Iterable[Event]:
    """First the HParams session, then rounds, results and histograms."""
    for content in _session(hparams(run, arm)):
        yield _event(Summary.Value(tag=content[0], metadata=content[1]))
    for number, values in round_scalars(run, arm).items():
        for name, value in values.items():
            yield _event(_scalar(f"rounds/{name}", value), number)
    for tag, value in results(run, arm).items():
        yield _event(_scalar(tag, value))
    for (number, tag), tally in sorted(histograms(arm).items()):
        yield _event(Summary.Value(tag=tag, histo=tally.proto()), number)


# -- hyper-parameters -----------------------------------------------------------------------------


def hparams(run: FinishedRun, arm: CleanedArm) -> dict[str, str | float]:
    """The values of `HPARAMS` that an arm has."""
    manifest, config = arm.manifest, run.config
    selection = manifest.get("selection") or {}
    asked = ((config.get("loop") or {}).get("arms") or {}).get(arm.name) or {}
    keep = selection.get("keep")
    if keep == "auto":
        keep = (manifest.get("share") or {}).get("keep")
    found: dict[str, Any] = {
        "run": run.root.name,
        "arm": arm.name,
        "rule": selection.get("rule"),
        "level": selection.get("scope"),
        "keep": keep if is_ranked(arm) else None,
        "schedule": manifest.get("schedule") or asked.get("schedule"),
        "weighting": asked.get("weighting"),
        "seed": manifest.get("seed", config.get("seed_everything")),
        "base": None if run.base is None else run.base.name,
    }
    wanted = {True: (int, float), False: str}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, wanted[HPARAMS[name]])  # type: ignore[arg-type]
    }


def results(run: FinishedRun, arm: CleanedArm) -> dict[str, float]:
    """The values of `METRICS` that an arm has: what was measured of its last round's model."""
    found = {"result/kept_share": kept_share(arm.manifest)}
    measured = round_results(run, arm).get(max(arm.rounds, default=1))
    if measured is not None:
        if accuracy := measured.accuracy.get(ALL):
            found["result/accuracy"] = accuracy.share
        if ALL in measured.validation_nll:
            found["result/validation_nll"] = measured.validation_nll[ALL]
        if mask := measured.mask.get(ALL):
            names = ("auroc", "auroc_corrupted", "precision", "recall", "corrupted_kept")
            found |= {f"result/{name}": float(getattr(mask, name)) for name in names}
    return {tag: value for tag, value in found.items() if math.isfinite(value)}


def _session(values: dict[str, str | float]) -> list[tuple[str, SummaryMetadata]]:
    """What the HParams plugin reads: the columns of all runs, this one's values, and its end.

    Every arm names all columns, since TensorBoard takes them from whichever it reads first.
    """
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                type=api_pb2.DATA_TYPE_FLOAT64 if number else api_pb2.DATA_TYPE_STRING,
            )
            for name, number in HPARAMS.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS],
    )
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in values.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    parts = {
        metadata.EXPERIMENT_TAG: plugin_data_pb2.HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(
            session_start_info=start
        ),
        metadata.SESSION_END_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_end_info=end),
    }
    return [(tag, metadata.create_summary_metadata(data)) for tag, data in parts.items()]


# -- histograms and figures -----------------------------------------------------------------------


@dataclass
class Tally:
    """A histogram that grows block by block: buckets (l, r] between `_LIMITS` and beyond."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(_LIMITS) + 1, dtype=np.int64))
    least: float = math.inf
    most: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Finite values, float64, shape (n,)."""
        if len(values):
            at = np.searchsorted(_LIMITS, values, side="left")
            self.counts += np.bincount(at, minlength=len(self.counts))
            self.least = min(self.least, float(values.min()))
            self.most = max(self.most, float(values.max()))
            self.total += float(values.sum())
            self.squares += float((values * values).sum())

    def proto(self) -> HistogramProto:
        """As TensorBoard stores it; empty buckets at either end are left out."""
        full = np.flatnonzero(self.counts)
        first, last = int(full[0]), int(full[-1])
        # the last bucket ends at the largest value, and the first begins at the smallest
        limits = [*_LIMITS[first:last], self.most]
        return HistogramProto(
            min=self.least,
            max=self.most,
            num=float(self.counts.sum()),
            sum=self.total,
            sum_squares=self.squares,
            bucket_limit=limits,
            bucket=self.counts[first : last + 1].tolist(),
        )


def histograms(arm: CleanedArm) -> dict[tuple[int, str], Tally]:
    """(round, tag) -> the distribution over the tokens that the rule looked at in that round.

    Arms that are not self-evolving have round 1 alone. What an arm has no values of is left out.
    """
    found: dict[tuple[int, str], Tally] = {}
    many = "rounds" in arm.manifest
    for ranked in ranked_blocks(arm):
        rounds = ranked.step if many else np.ones_like(ranked.step)
        for name, tag in QUANTITIES.items():
            values = getattr(ranked.block, name)[ranked.at].astype(np.float64)
            finite = np.isfinite(values)
            for number in np.unique(rounds[finite]).tolist():
                tally = found.setdefault((number, tag), Tally())
                tally.add(values[finite & (rounds == number)])
    return found


def _image(path: Path) -> Summary.Value:
    """A PNG as it is, not drawn anew."""
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise ValueError(f"{path} is no PNG; remove it and write the report again")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
    return Summary.Value(tag=f"report/{path.stem}", image=image)
