"""Benchmark part: self-evolving cleaning from end to end, and the same loop the published way."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts import bench_published as published
from scripts.bench_measure import OURS, THEIRS, Line, interleave
from scripts.bench_models import published_rows
from scripts.bench_workload import KEEP, ROOT, Options
from tokenclean import commands
from tokenclean.data import planted
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.models import BaseConfig, LoraSettings, load_tokenizer

#: what `tokenclean clean` is given; the published side takes its numbers from the same files
CONFIGS = (
    "model/planted",
    "data/planted_small",
    "fit/planted",
    "clean/planted",
    "clean/self_evolving",
)


def _files() -> list[Path]:
    return [ROOT / "configs" / f"{name}.yaml" for name in CONFIGS]


def _settings() -> dict[str, Any]:
    """The configuration files laid over one another."""
    merged: dict[str, Any] = {}
    for file in _files():
        for section, values in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            merged.setdefault(section, {}).update(values)
    return merged


def _recipe(settings: dict[str, Any]) -> published.Recipe:
    model = settings["model"]
    return published.Recipe(
        r=model["lora"]["r"],
        alpha=model["lora"]["alpha"],
        learning_rate=model["optimizer"]["init_args"]["lr"],
        warmup_ratio=model["warmup_ratio"],
        gradient_clip=model["gradient_clip"],
        batch_size=settings["data"]["batch_size"],
        epochs=settings["trainer"]["max_epochs"],
        warmup_epochs=settings["loop"]["warmup_epochs"],
        keep=KEEP,
        modules=LoraSettings().target_modules,
    )


def run(options: Options) -> Iterator[Line]:
    """The planted pool in five parts: warm-up and four rounds.

    Both sides take the same steps on the same parts. Ours tokenises the pool each time, writes logs
    and parses its command line; the published side gets the tokens for nothing and one process for
    all of its stages.
    """
    settings, on_gpu = _settings(), options.device == "cuda"
    base, max_length = str(ROOT / settings["model"]["base"]["name"]), settings["data"]["max_length"]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        planted.main(["--out", name, "--samples", str(options.run_samples)])
        path = str(folder / "pool.jsonl")
        data = TuluDataModule(path=path, max_length=max_length, cache_dir=str(folder / "cache"))
        data.use_tokenizer(load_tokenizer(BaseConfig(name=base)))
        data.prepare_data()
        data.setup()
        parts = [published_rows(data.pool, part) for part in data.subset_rows()]

        def ours(repeat: int) -> Callable[[], Any]:
            place = folder / f"ours_{repeat}"
            argv = [word for file in _files() for word in ("-c", str(file))]
            argv += ["--model.base.name", base, "--data.path", path]
            # The published loop measures nothing on the way.
            argv += ["--data.validation_path", "null", "--data.test_path", "null"]
            argv += ["--data.cache_dir", str(place / "cache")]  # nothing is left from last time
            argv += ["--trainer.accelerator", options.device]
            argv += ["--trainer.precision", "bf16-mixed" if on_gpu else "32-true"]
            argv += ["--trainer.enable_progress_bar", "false"]
            argv += ["--outputs", str(place), "--name", "run"]
            return lambda: commands.clean(argv)

        def theirs(repeat: int) -> Callable[[], Any]:
            place = folder / f"published_{repeat}"
            place.mkdir()
            recipe = _recipe(settings)
            return lambda: published.self_evolving(
                parts, base, place, recipe, max_length, options.device
            )

        sides = {OURS: ours, THEIRS: theirs}
        # Minutes long: a warm-up would not show.
        measured = interleave(
            sides, max(1, options.repeats // 2), options.device, "run", warm_up=False
        )
    case = f"planted pool, {options.run_samples:,} samples, self-evolving"
    yield measured.line("run", case, THEIRS, OURS)
