"""`tokenclean evaluate`: benchmarks on named models, or on the base and every arm of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile

from tokenclean.evaluation.benchmarks import Column, Source
from tokenclean.evaluation.compare import MEAN, Cell, Results, reference_of
from tokenclean.evaluation.harness import Settings, check_tokenizer, evaluate_model, load_cell
from tokenclean.models import BaseConfig, Network, load_tokenizer
from tokenclean.models.adapters import adapter_folders
from tokenclean.models.loading import Speed, load_config
from tokenclean.parsing import Parser, allow
from tokenclean.publish import write_json, write_text
from tokenclean.runs import CONFIG, SUMMARY, open_run, run_folder, write_summary
from tokenclean.trust import check_remote_code, read_yaml, safe_name

log = logging.getLogger(__name__)

BASE = "base"


@dataclass
class ModelChoice:
    """A model to evaluate.

    Args:
        base: its base, or the whole model; by default the command's ``--base``.
        adapters: adapter folders (or arms of a run) on top of it, in order.
    """

    base: BaseConfig | None = None
    adapters: list[str] | None = None


allow(Column, BaseConfig, Speed, ModelChoice)


@dataclass(frozen=True)
class _Model:
    name: str
    base: BaseConfig
    adapters: tuple[str, ...] = ()


def evaluate(argv: list[str]) -> None:
    """Run benchmarks of lm-evaluation-harness on models and arms."""
    begun = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("tokenclean").setLevel(logging.INFO)
    parser = _parser()
    config = parser.parse_args(_gather_runs(argv))
    plain = yaml.safe_load(parser.dump(config, skip_validation=True))
    config = parser.instantiate_classes(config)
    files = [Path(str(file)).stem for file in config.config or []]
    stem = "-".join(["evaluate", *dict.fromkeys(files)])
    if config.name is None:
        safe_name(stem, "--config")
    else:
        safe_name(config.name, "--name")
    # What only changes where it runs or what is shown may differ from call to call.
    for key in ("batch_size", "device", "against"):
        plain.pop(key, None)
    folder = run_folder(config.outputs, config.name, stem, plain)

    columns: list[Column] = config.columns or []
    _check_columns(columns)
    models, seeds = _models(config.base, config.adapters, config.models, config.run)
    names = [model.name for model in models]
    if config.against is not None and not any(
        reference_of(name, config.against, names) for name in names
    ):
        raise ValueError(
            f"--against: {config.against} is none of the models with another to compare "
            f"({', '.join(names)})"
        )
    planted = config.planted_test or _planted_test(config.run)
    settings = Settings(
        *(config.batch_size, config.max_length, config.add_bos_token, config.limit),
        Source(config.data_dir, planted, config.include_path),
    )
    bases = _unique([model.base for model in models])
    for base in bases:
        check_tokenizer(load_tokenizer(base), settings.add_bos_token)
        _check_context(base, settings.max_length)

    with open_run(folder, plain):
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        rows: dict[str, dict[str, Cell]] = {}
        for base in bases:
            group = [model for model in models if model.base == base]
            for name, cells in _evaluate_group(group, columns, settings, folder, device):
                rows[name] = cells
                _write(folder, Results(columns, rows, None, settings.limit))
        rows = {name: rows[name] for name in names}
        results = Results(columns, rows, config.against, settings.limit, seeds)
        text = _write(folder, results)
    print(f"\n{text}")
    summary: dict[str, Any] = {
        "models": len(models),
        "columns": len(columns),
        "missing": sum(c.reason is not None for cells in rows.values() for c in cells.values()),
        "nan": sum(c.nan for cells in rows.values() for c in cells.values()),
        "seconds": round(time.perf_counter() - begun, 1),
        "results": str(folder / "results.md"),
    }
    write_summary(folder, summary)


def _parser() -> Parser:
    parser = Parser(
        prog="tokenclean evaluate",
        description="Run benchmarks of lm-evaluation-harness on models and arms.",
        usage="%(prog)s [-c CONFIG.yaml ...] [--option value ...]",
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file")
    parser.add_argument("--columns", type=list[Column] | None, help="the table's columns")
    parser.add_argument("--base", type=BaseConfig | None, help="the base, or a whole model")
    parser.add_argument(
        "--adapters",
        type=str,
        default=[],
        nargs="*",
        help="adapter folders or arms on the base, in order",
    )
    parser.add_argument(
        "--models", type=dict[str, ModelChoice] | None, help="several models by name"
    )
    parser.add_argument(
        "--run",
        type=str,
        default=[],
        nargs="*",
        help="finished `clean` run(s): base and every arm; several are seeds of the same arms",
    )
    parser.add_argument("--against", type=str | None, help="model or arm to compare others with")
    parser.add_argument("--data_dir", type=str | None, help="local files instead of the hub")
    parser.add_argument("--planted_test", type=str | None, help="planted test file")
    parser.add_argument("--include_path", type=str | None, help="folder of your own task YAMLs")
    parser.add_argument("--limit", type=int | None, help="first so many questions of every task")
    parser.add_argument("--batch_size", type=int, default=8, help="requests per forward pass")
    parser.add_argument("--max_length", type=int | None, help="default: the model's context")
    parser.add_argument(
        "--add_bos_token",
        type=bool | None,
        default=False,
        help="BOS in front; null: as the tokenizer does (the paper: none)",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="run folder's name")
    parser.add_argument("--outputs", type=str, default="outputs", help="where run folders are")
    return parser


def _gather_runs(argv: list[str]) -> list[str]:
    """``--run a --run b`` is ``--run a b``."""
    rest: list[str] = []
    runs: list[str] = []
    words = iter(argv)
    taking = False
    for word in words:
        if word == "--run":
            taking = True
        elif word.startswith("--run="):
            taking, runs = False, [*runs, word.removeprefix("--run=")]
        elif word.startswith("-") or not taking:
            taking, rest = False, [*rest, word]
        else:
            runs.append(word)
    return [*rest, *(["--run", *runs] if runs else [])]


def _check_columns(columns: list[Column]) -> None:
    if not columns:
        raise ValueError("--columns: no tasks; give -c configs/evaluate/paper.yaml or planted.yaml")
    names = [column.name for column in columns]
    twice = {name for name in names if names.count(name) > 1} | ({MEAN} & set(names))
    if twice:
        raise ValueError(f"--columns: the name {', '.join(sorted(twice))} is taken twice")


def _check_context(base: BaseConfig, max_length: int | None) -> None:
    context = getattr(load_config(base).get_text_config(), "max_position_embeddings", None)
    if max_length is not None and context is not None and max_length > context:
        raise ValueError(
            f"--max_length: {max_length} exceeds the context of {base.name}, {context}; pass "
            f"--max_length {context} or less"
        )


# -- which models ---------------------------------------------------------------------------------


def _models(
    base: BaseConfig | None,
    adapters: list[str],
    named: dict[str, ModelChoice] | None,
    runs: list[str],
) -> tuple[list[_Model], dict[str, list[str]]]:
    """Every model of the call; arm -> its models over several runs."""
    if (base is not None or adapters) and runs:
        raise ValueError("--run brings its own base; leave --base and --adapters out")
    models: list[_Model] = []
    seeds: dict[str, list[str]] = defaultdict(list)
    if named:
        if adapters:
            raise ValueError("--adapters and --models: name the adapters in --models")
        for name, choice in named.items():
            safe_name(name, "--models")
            own = choice.base or base
            if own is None:
                raise ValueError(f"--models: {name} has no base; give one there or with --base")
            models.append(_Model(name, own, tuple(adapter_folders(choice.adapters))))
    elif base is not None:
        models.append(_Model(BASE, base))
        if adapters:
            name = safe_name(Path(adapters[-1]).name, "--adapters")
            models.append(_Model(name, base, tuple(adapter_folders(adapters))))
    elif adapters:
        raise ValueError("--adapters: give the base as well, --base.name")
    configs = [_run_config(run) for run in runs]
    bases = [_base_of(config, run) for config, run in zip(configs, runs, strict=True)]
    labels = _labels(runs)
    shared = len(_unique(bases)) == 1
    for label, run, own in zip(labels, runs, bases, strict=True):
        prefix = f"{label}/" if len(runs) > 1 else ""
        if not shared or own is bases[0]:
            models.append(_Model(BASE if shared else f"{prefix}{BASE}", own))
        for arm in _arms(run):
            name = f"{prefix}{arm.name}"
            if (arm / "adapter" / "adapter_config.json").is_file():
                models.append(_Model(name, own, tuple(adapter_folders(str(arm)))))
            else:  # full fine-tuning: a whole model
                whole = BaseConfig(str(arm / "adapter"), tokenizer=own.tokenizer or own.name)
                models.append(_Model(name, whole))
            seeds[arm.name].append(name)
    if not models:
        raise ValueError("no model: give --base.name, --models or --run")
    names = [model.name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {', '.join(twice)}; name them with --models")
    several = {arm: of for arm, of in seeds.items() if len(of) > 1}
    return models, several


def _unique(bases: list[BaseConfig]) -> list[BaseConfig]:
    found: list[BaseConfig] = []
    for base in bases:
        if base not in found:
            found.append(base)
    return found


def _labels(runs: list[str]) -> list[str]:
    labels = [Path(run).name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(Path(run)).strip("./").replace("/", "_") for run in runs]
    for label in labels:
        safe_name(label, "--run")
    if len(set(labels)) < len(labels):
        raise ValueError("--run: one run is given twice")
    return labels


def _run_config(run: str) -> dict[str, Any]:
    folder = Path(run)
    if not (folder / CONFIG).is_file() or not (folder / "arms").is_dir():
        raise ValueError(f"--run: {run} is no folder of a `clean` run")
    if not (folder / SUMMARY).is_file():
        raise ValueError(f"--run: {run} is not finished; the same `clean` command goes on with it")
    config: dict[str, Any] = read_yaml(folder / CONFIG)
    return config


def _base_of(config: dict[str, Any], run: str) -> BaseConfig:
    try:
        plain = dict(config["model"]["base"])
        check_remote_code(plain.get("trust_remote_code"), f"--run: {run}: trust_remote_code")
        return BaseConfig(**{**plain, "speed": Speed(**plain.get("speed", {}))})
    except (KeyError, TypeError) as error:
        raise ValueError(f"--run: {run}/{CONFIG} names no base model: {error}") from None


def _arms(run: str) -> list[Path]:
    found = sorted(p.parent for p in (Path(run) / "arms").glob("*/adapter") if p.is_dir())
    results = Path(run) / "results.json"
    if results.is_file():  # in the order of the run's own table
        order = [row["name"] for row in json.loads(results.read_text(encoding="utf-8"))]
        found.sort(key=lambda p: order.index(p.name) if p.name in order else len(order))
    if not found:
        raise ValueError(f"--run: {run} holds no trained arm (arms/*/adapter)")
    return found


def _planted_test(runs: list[str]) -> str | None:
    """The test file that a run was judged on."""
    for run in runs:
        path = (_run_config(run).get("data") or {}).get("test_path")
        if path and Path(path).is_file():
            return str(path)
    return None


# -- running --------------------------------------------------------------------------------------


def _evaluate_group(
    models: list[_Model], columns: list[Column], settings: Settings, folder: Path, device: str
) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Models over one base, which is read once, and only if something is left to run."""
    network: Network | None = None
    tokenizer = None
    for model in models:
        place, fingerprint = folder / "models" / model.name, _fingerprint(model)
        if any(load_cell(place, c, settings, fingerprint) is None for c in columns):
            if network is None:
                tokenizer = load_tokenizer(model.base)
                network = Network.load(model.base, device)
            network.drop_adapters()
            for adapter in model.adapters:
                network.load_adapter(adapter)
            if not model.base.load_in_4bit:  # those weights are on the GPU already
                network.to(device)
        yield (
            model.name,
            evaluate_model(network, tokenizer, columns, settings, place, model.name, fingerprint),
        )


def _fingerprint(model: _Model) -> str:
    """What a model is, by the files it is read from; a hub name stands for itself."""
    digest = hashlib.sha256(repr(model.base).encode())
    for place in (model.base.name, *model.adapters):
        for file in sorted(Path(place).glob("*.safetensors")):
            digest.update(_content(file, file.stat().st_mtime_ns))
    return digest.hexdigest()[:16]


@cache
def _content(file: Path, changed: int) -> bytes:
    """Hash of a file: many models share one base."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _write(folder: Path, results: Results) -> str:
    """The tables as Markdown, CSV and JSON."""
    text = results.markdown()
    write_text(folder / "results.md", text)
    write_text(folder / "results.csv", results.csv())
    write_json(folder / "results.json", results.plain())
    return text
