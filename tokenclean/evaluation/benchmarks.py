"""Which tasks stand behind a column of the table, from the hub or from local files.

A column names tasks of lm-evaluation-harness, of this package (``tasks/``), or of a folder of the
user's own. The seven benchmarks of the paper are read from the harness's own YAML without
scanning its thousands of others; anything else costs that scan once.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenclean.trust import OPTION, TASKS, is_trusted

log = logging.getLogger(__name__)

OUR_TASKS = Path(__file__).parent / "tasks"

#: Benchmark -> its YAML files inside the harness.
_SHIPPED = {
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "tydiqa_goldp": "tydiqa/tydiqa_goldp_*.yaml",
    "logiqa": "logiqa/logiqa.yaml",
    "mmlu": "mmlu/default/mmlu_*.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
}
LANGUAGES = {
    "ar": "arabic",
    "bn": "bengali",
    "en": "english",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}


@dataclass
class Column:
    """One column of the table.

    Args:
        name: its title.
        tasks: names of tasks or groups.
        metric: what counts per question, e.g. acc, acc_norm, f1, exact_match.
        shots: examples before the question; null: what the task says.
        average: over all ``questions`` (larger tasks count more), or over ``tasks`` (all alike).
        in_mean: whether the mean over columns counts it.
        chance: what guessing gives, in percent; for figures.
    """

    name: str
    tasks: list[str]
    metric: str = "acc"
    shots: int | None = None
    average: Literal["questions", "tasks"] = "questions"
    in_mean: bool = True
    chance: float | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"columns: {self.name} names no task")
        for task in self.tasks:
            # The harness takes a name that it does not know for the path of a task file.
            if not re.fullmatch(r"\w[\w.+-]*", task) or task.endswith((".yaml", ".yml")):
                raise ValueError(
                    f"columns: {self.name}: {task!r} is no name of a task; task files of your own "
                    "are found by name in --include_path"
                )
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"columns: {self.name}: shots {self.shots} is negative")


@dataclass
class Source:
    """Where tasks and their data come from.

    Args:
        data_dir: folder with local files; without it the hub is asked.
        planted_test: a planted test file, where ``data_dir`` holds none.
        include_path: folder with the user's own task YAMLs.
    """

    data_dir: str | None = None
    planted_test: str | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        for option in ("data_dir", "planted_test", "include_path"):
            value = getattr(self, option)
            if value is not None and not Path(value).exists():
                raise ValueError(f"--{option}: {value} does not exist")
        if self.include_path is not None and not is_trusted(TASKS):
            raise ValueError(
                f"--include_path: the task files of {self.include_path} can run code, by !function "
                f"and in their templates; if you trust them, add {OPTION} {TASKS}"
            )


class Tasks:
    """Makes the harness's task objects for a column.

    Args:
        source: see `Source`.
        shorten: text and number of tokens -> the text cut to so many; for tasks whose metadata
            asks for it (``cut_context``).
    """

    def __init__(self, source: Source, shorten: Callable[[str, int], str]):
        from lm_eval.tasks import TaskManager

        self.source, self.shorten = source, shorten
        metadata: Any = {"data_dir": source.data_dir, "planted_test": source.planted_test}
        paths = [str(OUR_TASKS), *([source.include_path] if source.include_path else [])]
        self._manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        self._all: Any = None
        self._metadata = metadata

    def load(self, column: Column) -> tuple[dict[str, Any], list[str]]:
        """The task objects of a column by name, and what there is to say about their data.

        Raises:
            Exception: whatever stops a task from loading; the caller makes it a missing cell.
        """
        tasks: dict[str, Any] = {}
        notes: list[str] = []
        for name in column.tasks:
            for spec in self._specs(name, column.shots, notes):
                tasks |= self._manager_of(spec).load([spec])["tasks"]
        for task in tasks.values():
            if column.shots is not None:
                task.set_config(key="num_fewshot", value=column.shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # the harness's default
            _check_metric(task, column)
            self._cut(task)
        held_out = [name for name, t in tasks.items() if getattr(t.dataset, "held_out", False)]
        if held_out:
            notes.append(
                f"the example of {', '.join(held_out)} is a held-out validation row, since there "
                "is no training file"
            )
        return tasks, list(dict.fromkeys(notes))

    def _specs(self, name: str, shots: int | None, notes: list[str]) -> list[Any]:
        """What to load for a name: configurations of the harness's own files, or the name."""
        from lm_eval import tasks as harness
        from lm_eval.tasks._yaml_loader import load_yaml

        root = Path(harness.__file__).parent
        family = next((f for f in _SHIPPED if name == f or name.startswith(f + "_")), None)
        files = sorted(root.glob(_SHIPPED[family])) if family else []
        if name != family:
            files = [file for file in files if file.stem == name]
        if not files or family is None:
            return [name]
        specs = [load_yaml(file) for file in files]
        if self.source.data_dir is not None:
            folder = Path(self.source.data_dir)
            for spec in specs:
                notes += local(family, spec, folder, shots or 0)
        elif family == "logiqa":
            # The hub's default is a script, which `datasets` no longer runs.
            specs[0]["dataset_kwargs"] = {"revision": "refs/convert/parquet"}
        for spec in specs:
            spec.pop("tag", None)
        return specs

    def _manager_of(self, spec: Any) -> Any:
        """Ours, unless it does not know the name: then the one that has read every task."""
        if not isinstance(spec, str) or spec in self._manager.task_index:
            return self._manager
        if self._all is None:
            from lm_eval.tasks import TaskManager

            log.info("%s: reading the index of all tasks of the harness", spec)
            self._all = TaskManager(metadata=self._metadata)
        return self._all

    def _cut(self, task: Any) -> None:
        limit = (task.config.metadata or {}).get("cut_context")
        if not limit:
            return
        ask = task.config.doc_to_text

        def cut(doc: dict[str, Any]) -> str:
            return str(ask({**doc, "context": self.shorten(doc["context"], int(limit))}))

        task.config.doc_to_text = task.fewshot_cfg.doc_to_text = cut


def _check_metric(task: Any, column: Column) -> None:
    metrics = [entry["metric"] for entry in task.config.metric_list or []]
    if column.metric not in metrics:
        raise ValueError(f"{task.config.task} has no metric {column.metric}, but {metrics}")


# -- local files ----------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ValueError: naming file and line of what is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not an object")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def read_splits(files: dict[str, str], hold_out: bool = False, **_: Any) -> Any:
    """Local JSONL files as the data set of a task, by split.

    With ``hold_out`` the first validation row becomes the train split, and is not asked.
    """
    from datasets import Dataset, DatasetDict

    rows = {split: read_jsonl(Path(path)) for split, path in files.items()}
    if hold_out:
        rows["train"], rows["validation"] = rows["validation"][:1], rows["validation"][1:]
    data: Any = DatasetDict({split: Dataset.from_list(table) for split, table in rows.items()})
    data.held_out = hold_out
    return data


def _file(folder: Path, *names: str) -> Path:
    """The first of some files that is there.

    Raises:
        ValueError: if none is.
    """
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            return found[0]
    raise ValueError(f"--data_dir: {folder} has no {' or '.join(names)}")


def local(family: str, spec: dict[str, Any], data_dir: Path, shots: int) -> list[str]:
    """Point a harness task's configuration at local files; what differs from its own data.

    The layout is ``<benchmark>/<split>.jsonl`` with the hub's columns; ``mmlu/<subject>/`` and
    ``tydiqa/<language>_<split>.jsonl``; ``truthfulqa_mc/`` may call its split ``v0``; HellaSwag may
    be preprocessed already (query, choices, gold).

    Raises:
        ValueError: if a file that the task needs is not there.
    """
    notes: list[str] = []
    splits: dict[str, Path] = {}
    hold_out = False
    if family == "truthfulqa_mc2":
        file = _file(data_dir / "truthfulqa_mc", "validation.jsonl", "v0.jsonl")
        splits["validation"] = file
    elif family == "mmlu":
        folder = data_dir / "mmlu" / str(spec["dataset_name"])
        splits = {"test": _file(folder, "test.jsonl"), "dev": _file(folder, "dev.jsonl")}
    elif family == "tydiqa_goldp":
        language = LANGUAGES[str(spec["task"]).rpartition("_")[2]]
        folder = data_dir / "tydiqa"
        splits["validation"] = _file(folder, f"{language}_validation.jsonl")
        train = folder / f"{language}_train.jsonl"
        hold_out = not train.is_file()
        if not hold_out:
            splits["train"] = train
    else:
        folder = data_dir / family
        asked = "test" if spec.get("test_split") else "validation"
        splits[asked] = _file(folder, f"{asked}.jsonl", f"{asked}_*.jsonl")
        if asked == "test" and (folder / "validation.jsonl").is_file():
            splits["validation"] = folder / "validation.jsonl"
        if (folder / "train.jsonl").is_file():
            splits["train"] = folder / "train.jsonl"
        if splits[asked].stem != asked:
            notes.append(f"questions from {splits[asked].name}: not the whole benchmark")
        if family == "hellaswag" and "query" in read_jsonl(splits[asked])[0]:
            spec.pop("process_docs", None)
            spec["doc_to_target"] = "{{gold}}"
        if shots and not {"train", "validation"} & (set(splits) - {asked}):
            notes.append("examples from the evaluated split: no training file")
    for key, split in (("training_split", "train"), ("validation_split", "validation")):
        if split not in splits and not (hold_out and split == "train"):
            spec[key] = None
    spec["custom_dataset"] = read_splits
    spec["dataset_kwargs"] = {
        "files": {split: str(path) for split, path in splits.items()},
        "hold_out": hold_out,
    }
    return notes
