"""A model in memory under lm-evaluation-harness: one column of tasks after the other.

lm_eval is slow to import, so it is imported where it is used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tokenclean.evaluation.benchmarks import Column, Source, Tasks
from tokenclean.evaluation.compare import Cell, Record, estimate
from tokenclean.models import Network
from tokenclean.publish import complete_folder, write_json

log = logging.getLogger(__name__)

_CELL, _RECORDS, _LM_EVAL = "cell.json", "records.jsonl", "lm_eval.json"


@dataclass
class Settings:
    """How tasks are asked; the same for every model.

    Args:
        batch_size: requests per forward pass.
        max_length: tokens of a request, cut on the left; by default the model's context.
        add_bos_token: put a BOS in front; null: as the tokenizer does. The paper's lm-eval (0.4.7)
            scored Llama and Mistral without.
        limit: only the first so many questions of every task.
        source: where tasks and data come from.
    """

    batch_size: int = 8
    max_length: int | None = None
    add_bos_token: bool | None = False
    limit: int | None = None
    source: Source = field(default_factory=Source)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size: {self.batch_size} is less than 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(
                f"--limit: {self.limit} is less than 1; leave it out for all questions"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max_length: {self.max_length} is less than 2")


def check_tokenizer(tokenizer: Any, add_bos_token: bool | None) -> Any:
    """A copy of the tokenizer that the harness can use: with a pad token.

    Raises:
        ValueError: if it appends an EOS, which would stand between question and answer and ruin
            every multiple-choice score.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if add_bos_token is not False:
        # What the harness asks for: special tokens as the tokenizer sets them.
        ids = tokenizer.encode("a")
        if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
            raise ValueError(
                "the tokenizer appends its EOS to every text, which ruins multiple choice; pass "
                "--add_bos_token false"
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad, EOS or unknown token to pad with; set one")
    return tokenizer


def evaluate_model(
    model: Any,
    tokenizer: Any,
    columns: Sequence[Column],
    settings: Settings | None = None,
    folder: Path | None = None,
    name: str = "model",
    fingerprint: str = "",
) -> dict[str, Cell]:
    """Run every column's tasks on a model in memory.

    A column whose tasks fail to load or run is a cell with the reason in it. The model's train or
    eval mode, module by module, and its use of adapters are as before afterwards; a `Network` is
    asked at its present depth.

    Args:
        model: a `Network`, a transformers causal LM, or a `PeftModel`.
        tokenizer: its tokenizer; not changed.
        columns: what to run.
        settings: see `Settings`.
        folder: where to keep each column's records and lm_eval's own results; what is there from
            before under the same ``fingerprint`` is read instead of run again.
        name: of the model, for messages.
        fingerprint: what the model is; see ``folder``.

    Returns:
        Column's name -> cell, in the order given.
    """
    settings = settings or Settings()
    cells = {c.name: load_cell(folder, c, settings, fingerprint) for c in columns}
    missing = [c for c in columns if cells[c.name] is None]
    if missing:
        tokenizer = check_tokenizer(tokenizer, settings.add_bos_token)
        with ExitStack() as stack:
            if isinstance(model, Network):
                model = stack.enter_context(model.merged()).hf
            stack.enter_context(_as_it_was(model))
            stack.enter_context(_quiet())
            lm = _harness_model()(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                max_length=settings.max_length,
                add_bos_token=settings.add_bos_token,
                softmax_dtype="float32",
            )
            tasks = _tasks(settings.source, tokenizer)
            for column in missing:
                cell, own = _run(lm, tasks, column, settings.limit)
                cells[column.name] = cell
                log.info("%s: %s", name, _line(cell))
                if folder is not None and cell.reason is None:
                    _store(folder, column, settings, fingerprint, cell, own)
    return {name: cell for name, cell in cells.items() if cell is not None}


def _tasks(source: Source, tokenizer: Any) -> Tasks:
    def shorten(text: str, limit: int) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= limit:
            return text
        return str(tokenizer.decode(ids[:limit], skip_special_tokens=True))

    return Tasks(source, shorten)


def _run(lm: Any, tasks: Tasks, column: Column, limit: int | None) -> tuple[Cell, Any]:
    """One column, and lm_eval's own results of it; a failure is the cell's reason."""
    from lm_eval.evaluator import evaluate

    begun = time.perf_counter()
    lm.truncated = 0
    try:
        loaded, notes = tasks.load(column)
        results: Any = evaluate(
            lm, {"tasks": loaded, "groups": {}}, limit=limit, bootstrap_iters=1, log_samples=True
        )
        records = [
            Record(task, int(s["doc_id"]), str(s["doc_hash"]), float(s[column.metric]))
            for task, samples in results.pop("samples").items()
            for s in samples
            if s["filter"] == samples[0]["filter"]
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # one task's trouble is not the others'
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        log.debug("%s", column.name, exc_info=True)
        return Cell(column.name, reason=reason), None
    overall = estimate(records, column.average)
    cell = Cell(
        column.name,
        value=overall.value,
        stderr=overall.stderr,
        questions=len(records),
        nan=sum(record.value != record.value for record in records),
        truncated=lm.truncated,
        seconds=time.perf_counter() - begun,
        notes=notes,
        records=records,
    )
    return cell, results


def _line(cell: Cell) -> str:
    """One line about a finished cell."""
    if cell.reason is not None:
        return f"{cell.column} is missing: {cell.reason}"
    more = f", {cell.nan} of them NaN" if cell.nan else ""
    more += f", {cell.truncated} requests cut to the context" if cell.truncated else ""
    return (
        f"{cell.column} {100 * cell.value:.1f} ± {100 * cell.stderr:.1f} "
        f"({cell.questions} questions{more}; {cell.seconds:.0f} s)"
    )


# -- what is finished -----------------------------------------------------------------------------


def _key(column: Column, settings: Settings, fingerprint: str) -> dict[str, Any]:
    asked = {k: v for k, v in asdict(column).items() if k not in ("in_mean", "chance")}
    how = {k: v for k, v in asdict(settings).items() if k != "batch_size"}
    return {"column": asked, "settings": how, "model": fingerprint, "data": _data_hash(settings)}


def _data_hash(settings: Settings) -> str | None:
    """Content of the planted questions, which are drawn anew at will; other data hardly change."""
    test = settings.source.planted_test
    if test is None:
        return None
    return hashlib.sha256(Path(test).read_bytes()).hexdigest()[:16]


def cell_folder(folder: Path, column: Column) -> Path:
    """Where a column's results are: its name made fit for a path, told apart by a hash."""
    plain = "".join(c if c.isalnum() else "_" for c in column.name).strip("_").lower()
    if plain == column.name.lower():
        return folder / plain
    return folder / f"{plain}-{hashlib.sha256(column.name.encode()).hexdigest()[:4]}"


def load_cell(
    folder: Path | None, column: Column, settings: Settings, fingerprint: str
) -> Cell | None:
    """A finished cell, if there is one of this model, column and settings."""
    if folder is None or not (cell_folder(folder, column) / _CELL).is_file():
        return None
    place = cell_folder(folder, column)
    stored = json.loads((place / _CELL).read_text(encoding="utf-8"))
    if stored["key"] != _key(column, settings, fingerprint):
        log.info("%s: results of another model or setting; running it again", place)
        return None
    lines = (place / _RECORDS).read_text(encoding="utf-8").splitlines()
    values: dict[str, Any] = {
        k: float("nan") if v is None else v for k, v in stored["cell"].items()
    }
    records = [Record(**_number(json.loads(line))) for line in lines]
    return Cell(**{**values, "reason": None, "records": records})


def _number(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"value": float("nan") if record["value"] is None else record["value"]}


def _store(
    folder: Path, column: Column, settings: Settings, fingerprint: str, cell: Cell, own: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with complete_folder(cell_folder(folder, column)) as partial:
        lines = []
        for record in cell.records:
            nan = record.value != record.value
            lines.append(json.dumps({**asdict(record), "value": None if nan else record.value}))
        (partial / _RECORDS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = json.dumps(own, indent=2, default=str, ensure_ascii=False)
        (partial / _LM_EVAL).write_text(text + "\n", encoding="utf-8")
        stored = {"key": _key(column, settings, fingerprint), "cell": cell.plain()}
        write_json(partial / _CELL, stored)


# -- the harness ----------------------------------------------------------------------------------


@cache
def _harness_model() -> Any:
    """HFLM without progress bars, counting what its context cuts."""
    from lm_eval.models.huggingface import HFLM

    class CountingHFLM(HFLM):
        truncated = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **kw: Any
        ) -> Any:
            limit = self.max_length + 1  # the last token is only predicted
            self.truncated += sum(len(before) + len(after) > limit for _, before, after in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **kw)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def tok_batch_encode(
            self, strings: Any, left_truncate_len: int | None = None, **kw: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, **kw)
            if left_truncate_len:
                self.truncated += int((mask.sum(1) > left_truncate_len).sum())
                ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids, mask

    return CountingHFLM


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Give every module its train or eval mode back, and the model its generation settings."""
    modes = {module: module.training for module in model.modules()}
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if generation is not None:
            model.generation_config = generation


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter and no progress bars of the harness: a task is one line of ours."""
    import datasets

    names = ("lm_eval", "datasets", "transformers", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    plain: Callable[..., Any] = lambda items, **_: items  # noqa: E731
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with patch("lm_eval.api.task.tqdm", plain):
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
