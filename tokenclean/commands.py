"""The verbs. Each parses its options, opens its run folder, and hands over to the package."""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from lightning import LightningModule
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from tokenclean.arrow import ArrowTable
from tokenclean.cleaning.apply import ScoredRows, cleaned_manifest, reasons_table
from tokenclean.cleaning.apply import clean as clean_rows
from tokenclean.cleaning.arms import Arm, LoopConfig
from tokenclean.cleaning.loop import CleaningLoop
from tokenclean.cleaning.results import results_markdown
from tokenclean.costs import (
    SHARED,
    Cost,
    Ledger,
    charge_scoring,
    charge_training,
    check_room,
    directory_bytes,
    tokenise,
)
from tokenclean.data.cleaned import KIND as CLEANED
from tokenclean.data.cleaned import check_tokenizer
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.estimate import ModelShape, parameter_bytes
from tokenclean.models import (
    TRAINED_IDS,
    BaseConfig,
    LoraSettings,
    Network,
    check_base,
    load_tokenizer,
    trained_ids,
)
from tokenclean.models.loading import Speed, load_config
from tokenclean.parsing import Parser, Refusing, allow
from tokenclean.plan import Planner, Rows
from tokenclean.publish import MANIFEST, complete_folder, read_manifest, verify, write_json
from tokenclean.runs import (
    SUMMARY,
    check_inputs,
    check_processes,
    content_of,
    open_run,
    process_rank,
    run_folder,
    write_summary,
)
from tokenclean.scoring.attributes import AttributeSettings
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.logprobs import check_file, import_logprobs
from tokenclean.scoring.module import ScoringModule, score_pool, splits_layers
from tokenclean.scoring.probe import Probe, sentence_ends, write_probe
from tokenclean.scoring.shards import discard_shards
from tokenclean.scoring.table import ScoreTable
from tokenclean.selection.exchange import join
from tokenclean.selection.noise import PARTNERS
from tokenclean.selection.rule import describe_need
from tokenclean.selection.select import SelectionConfig
from tokenclean.trainer import Trainer
from tokenclean.training.module import CleanedSFTModule, paper_optimizer
from tokenclean.trust import read_yaml, safe_name

log = logging.getLogger("tokenclean")

_OPTIMIZERS = [
    value
    for value in vars(torch.optim).values()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
]
# What a configuration may name, class by class. What takes functions, reads pickles or talks to a
# service is left out; `--trust_import` adds it.
allow(
    *(BaseConfig, Speed, LoraSettings, SelectionConfig, AttributeSettings, LoopConfig, Arm),
    *(paper_optimizer, *_OPTIMIZERS),
    *(ModelCheckpoint, EarlyStopping, LearningRateMonitor, DeviceStatsMonitor, Timer),
    *(TQDMProgressBar, RichProgressBar, ModelSummary, RichModelSummary),
    *(TensorBoardLogger, CSVLogger),
    *(DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy),
    *(SimpleProfiler, AdvancedProfiler),
)

#: folder of a run of `score`, beside its table
PROBE = "probe"

#: Options of `score` that take losses from elsewhere, and the one that notes what the files hold.
_IMPORT = ("logprobs", "logprobs_model", "logprobs_trained_on")
_IMPORTED = "logprobs_content"
_USAGE = "%(prog)s [-c CONFIG.yaml ...] [--option value ...]"
_ON_GPU = torch.cuda.is_available()
_TRAINING_PRECISION = "bf16-mixed" if _ON_GPU else "32-true"
#: what importing this module took; `cli.main` sets it, so that a run's costs include it
import_seconds = 0.0


class _LightningParser(Refusing, LightningArgumentParser):
    """LightningCLI's parser, which refuses what is not allowed."""


class _Cli(LightningCLI):
    """LightningCLI with run folders of our own; instantiates, never runs."""

    def __init__(
        self, verb: str, model_class: type[LightningModule], argv: list[str], precision: str
    ):
        self.verb = verb
        super().__init__(
            model_class,
            TuluDataModule,
            trainer_class=Trainer,
            run=False,
            args=argv,
            parser_class=_LightningParser,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"tokenclean {verb}",
                "description": _first_line(model_class),
                # the options fill two pages: --help lists them, an error need not
                "usage": _USAGE,
            },
            trainer_defaults={
                # batches are dealt to processes by the data module
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "precision": precision,
                "max_epochs": 1,
                "log_every_n_steps": 5,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        _add_place(parser)
        parser.add_argument(
            "--estimate",
            action="store_true",
            help="print what the run would cost (FLOPs, time, memory, disk) instead of doing it",
        )
        if self.verb == "score":
            parser.add_argument(
                "--probe",
                type=bool,
                default=False,
                help="also look at responses after other samples' prompts (one device), which "
                "`select --selection.keep auto` needs of base and reference",
            )
            parser.add_argument(
                "--logprobs",
                type=str | None,
                help="take the losses from a file of log-probabilities that were computed "
                "elsewhere (JSONL, JSON or Parquet of id, logprobs and, if wanted, token_ids), "
                "and run no model",
            )
            parser.add_argument(
                "--logprobs_model",
                type=str | None,
                help="name of the model that computed them; default: the file's stem",
            )
            parser.add_argument(
                "--logprobs_trained_on",
                type=str | None,
                help="file of the ids of samples that this model was trained on: a JSON list, or "
                "one per line",
            )
            parser.add_argument(
                f"--{_IMPORTED}",
                type=str | None,
                help="hash of what these files hold, which the run notes; files that hold "
                "something else are refused",
            )
        if self.verb == "clean":
            parser.add_class_arguments(SelectionConfig, "selection")
            parser.add_class_arguments(LoopConfig, "loop")
            parser.add_class_arguments(AttributeSettings, "attributes")

    def before_instantiate_classes(self) -> None:
        _check_arms([str(file) for file in self.config.get("config") or []])
        self.plain = yaml.safe_load(self.parser.dump(self.config, skip_validation=True))
        self.estimate = self.plain.pop("estimate")
        for option in (*_IMPORT, _IMPORTED):  # runs without them are the ones they have always been
            if self.plain.get(option) is None:
                self.plain.pop(option, None)
        if "logprobs" in self.plain:
            _note_content(self.plain)
        if self.verb == "score":
            # The numbers are the same however many processes there are, and others may go on.
            self.plain["trainer"].update(devices="auto", num_nodes=1, strategy="auto")
        self.folder = _folder(self.config, self.plain, self.verb)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        kwargs = {"default_root_dir": str(self.folder), **kwargs}
        if self.config_init["trainer"].get("logger") is None:
            kwargs.setdefault("logger", _tensorboard(self.folder) if self.verb == "fit" else False)
        trainer: Any = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, Trainer)
        check_processes(trainer.world_size)
        return trainer

    def attach_tokenizer(self, base: BaseConfig) -> None:
        """Load the tokenizer and check base and data against each other, before any weight."""
        trainer = self.config["trainer"]
        if trainer["accumulate_grad_batches"] != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches: a step is one global batch; set data.batch_size "
                "(samples per step) and data.token_budget (tokens per forward pass) instead"
            )
        if trainer["gradient_clip_val"] is not None:
            raise ValueError("trainer.gradient_clip_val: set model.gradient_clip instead")
        tokenizer = load_tokenizer(base)
        max_length = self.datamodule.max_length
        if self.datamodule.cleaned_folder:
            # Tokenised already: its own length counts, and its own tokenizer.
            max_length = check_tokenizer(self.datamodule.cleaned_folder, tokenizer)["max_length"]
        check_base(base, tokenizer, max_length)
        self.datamodule.use_tokenizer(tokenizer)

    def ledger(self, begun: float) -> Ledger:
        """Where the costs of a call that began then go."""
        trainer: Any = self.trainer
        place = trainer.global_rank, trainer.world_size
        return Ledger(self.folder, trainer.strategy.root_device, begun, *place)

    def prepared(self) -> list[Cost]:
        """For an estimate: the data set up, and what its pool takes on disk."""
        data: TuluDataModule = self.datamodule
        data.prepare_data()
        data.setup()
        if data.cleaned_folder:
            return []
        folder = data.pool.folder.parent
        return [Cost(SHARED, "tokenise", samples=len(data.pool), disk=directory_bytes([folder]))]


def fit(argv: list[str]) -> None:
    """Fine-tune on a pool (every response token) or a cleaned pool (the kept ones)."""
    begun = _begin()
    cli = _Cli("fit", CleanedSFTModule, argv, _TRAINING_PRECISION)
    module: CleanedSFTModule = cli.model
    cli.attach_tokenizer(module.base)
    if cli.estimate:
        planner, costs = _fit_estimate(cli, module)
        print(planner.report(costs))
        return
    with open_run(cli.folder, cli.plain):
        _fit(cli, module, begun)


def _fit(cli: _Cli, module: CleanedSFTModule, begun: float) -> None:
    result = cli.folder / ("model" if module.lora is None else "adapter")
    there = (result / TRAINED_IDS).is_file()
    if there and (cli.folder / SUMMARY).is_file():
        print(f"{cli.folder}: finished before; {(cli.folder / SUMMARY)}")
        return
    ledger = cli.ledger(begun)
    tokenise(cli.datamodule, ledger, cli.folder.name)
    measured: dict[str, Any] = {}
    if there:  # a call was killed between the two: what it measured is lost, what it made is not
        log.info("%s is there already", result)
    else:
        if cli.trainer.is_global_zero:
            check_inputs(cli.folder, _inputs(cli, module.base, module.adapters))
        check_room(cli.folder, _fit_estimate(cli, module, timed=False)[1])
        measured = _train(cli, module, ledger, result)
    if cli.trainer.is_global_zero:
        ledger.store()
        rows = cli.datamodule.trained_rows()
        write_summary(
            cli.folder,
            {
                "samples": len(rows),
                "kept_tokens": int((rows.counts - rows.negative).sum()),
                "response_tokens": int(rows.responses.sum()),
                **measured,
                **ledger.summary(),
                "result": str(result),
            },
        )


def _train(cli: _Cli, module: CleanedSFTModule, ledger: Ledger, result: Path) -> dict[str, Any]:
    """Train and publish; returns what was measured on the way."""
    merged = cli.folder / "merged" if module.save_merged and module.lora is not None else None
    checkpoints = cli.folder / "checkpoints"
    trainer: Any = cli.trainer
    with ledger.measure(cli.folder.name, "train", network=lambda: module.network) as cost:
        keeps = bool(trainer.checkpoint_callbacks)  # --trainer.enable_checkpointing
        trainer.fit_within(checkpoints if keeps else None, module, cli.datamodule)
        assert module.network is not None
        module.network.freeze()
        loader: Any = trainer.train_dataloader
        rows: TokenRows = loader.dataset.rows
        before = (Path(name) for name in (module.base.name, *module.adapters))
        ids = set(rows.ids_with_targets()).union(*map(trained_ids, before))
        if trainer.is_global_zero:
            tokenizer = cli.datamodule.tokeniser.tokenizer
            # before the result, which says that all is done
            if merged is not None and not (merged / MANIFEST).is_file():
                with complete_folder(merged) as partial:
                    module.network.save_merged(partial, tokenizer)
            with complete_folder(result) as partial:
                if module.lora is None:
                    module.network.save_merged(partial, tokenizer)
                else:
                    module.network.save_stack(partial)
                write_json(partial / TRAINED_IDS, sorted(ids))
        shape = _shape(module.base)
        charge_training(cost, shape, cli.datamodule, rows, trainer, module.lora)
        cost.disk = directory_bytes([result, checkpoints, cli.folder / "merged"])
    return {"steps": trainer.global_step, **module.metrics()}


def score(argv: list[str]) -> None:
    """Write one model's score table, or make it from log-probabilities computed elsewhere."""
    begun = _begin()
    cli = _Cli("score", ScoringModule, argv, precision="16-mixed" if _ON_GPU else "32-true")
    module: ScoringModule = cli.model
    _check_import(cli, module)
    cli.attach_tokenizer(module.base)
    if cli.estimate:
        planner, costs = _score_estimate(cli, module)
        print(planner.report(costs))
        return
    with open_run(cli.folder, cli.plain):
        _score(cli, module, begun)


def _score(cli: _Cli, module: ScoringModule, begun: float) -> None:
    data: TuluDataModule = cli.datamodule
    table = cli.folder / "scores"
    written = (table / MANIFEST).is_file()
    if written and cli.trainer.is_global_zero:
        discard_shards(table)  # of a call that was killed before it had done so
    if written and (cli.folder / SUMMARY).is_file():
        print(f"{cli.folder}: finished before; {(cli.folder / SUMMARY)}")
        return
    ledger, arm = cli.ledger(begun), cli.folder.name
    trainer = cli.trainer
    tokenise(data, ledger, arm)
    rows = data.scored_rows()
    if written:
        log.info("%s is there already", table)
    elif "logprobs" in cli.plain:
        given, trained_on = cli.plain["logprobs"], cli.plain.get("logprobs_trained_on")
        name = cli.plain.get("logprobs_model")
        import_logprobs(Path(given), rows, table, name, trained_on and Path(trained_on))
    else:
        _check_processes(cli, module.base)
        check_room(cli.folder, _score_estimate(cli, module, timed=False)[1])
        with ledger.measure(arm, "score", network=lambda: module.network) as cost:
            module.load(trainer.strategy.root_device)
            assert module.network is not None
            if cli.plain["probe"]:
                probed = _write_probe(cli, module.network, rows.rows)
                charge_scoring(cost, _shape(module.base), *[probed] * (1 + PARTNERS))
            # The base is what others ask for again; a reference belongs to one run.
            cache = None if module.adapters else ScoreCache(data.cache_dir / "scores")
            if score_pool(module, trainer, data, rows, table, data.token_budget, cache):
                charge_scoring(cost, _shape(module.base), rows)
            cost.disk = directory_bytes([table])
    if trainer.is_global_zero:
        ledger.store()
        done = ScoreTable(table)
        write_summary(
            cli.folder,
            {
                "samples": len(done),
                "response_tokens": done.manifest["tokens"],
                "mean_nll": _mean(done),
                "model": done.manifest["model"],
                **ledger.summary(),
                "table": str(table),
            },
        )


def _note_content(plain: dict[str, Any]) -> None:
    """Make what the files hold part of the run: others under the same names are another run."""
    digests = []
    check_file(Path(plain["logprobs"]))
    for option in ("logprobs", "logprobs_trained_on"):
        if (name := plain.get(option)) is None:
            continue
        if not Path(name).is_file():
            raise ValueError(f"--{option}: {name} does not exist")
        with Path(name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    content = "-".join(digests)
    if plain.setdefault(_IMPORTED, content) != content:
        raise ValueError(
            f"--{_IMPORTED}: the files of --logprobs hold {content}, not {plain[_IMPORTED]}; leave "
            "it out to take them as they are"
        )


def _check_import(cli: _Cli, module: ScoringModule) -> None:
    """Refuse what does not go with losses from elsewhere, before anything is read."""
    given = [option for option in (*_IMPORT, _IMPORTED) if option in cli.plain]
    if not given:
        return
    if "logprobs" not in given:
        raise ValueError(f"--{given[0]}: it goes with --logprobs, which is not given")
    wrong = {
        "--estimate": cli.estimate,
        "--probe": cli.plain["probe"],
        "model.adapters": module.adapters,
        "model.columns": module.columns,
        "data.targets": cli.datamodule.targets != "response",
        "trainer.devices": cli.trainer.world_size > 1,
    }
    for option, is_set in wrong.items():
        if is_set:
            raise ValueError(
                f"{option}: it does not go with --logprobs, which runs no model and holds the "
                "losses of response tokens alone; leave it out"
            )


def _check_processes(cli: _Cli, base: BaseConfig) -> None:
    """Refuse what does not go with several processes, before weights are read."""
    if cli.plain["probe"] and cli.trainer.world_size > 1:
        raise ValueError("--probe: it runs on one device; score on one (--trainer.devices 1)")
    if base.load_in_4bit and splits_layers(cli.trainer):
        raise ValueError(
            "model.base.load_in_4bit: 4-bit weights cannot be split (trainer.strategy: fsdp2); "
            "take ddp, which keeps the whole model on every device"
        )


def _write_probe(cli: _Cli, network: Network, rows: np.ndarray) -> TokenRows:
    """Make the run's probe; the rows that it looked at, none if it was there already."""
    data: TuluDataModule = cli.datamodule
    if data.targets == "prompt":
        raise ValueError("--probe: it looks at responses; leave data.targets out")
    if (cli.folder / PROBE / MANIFEST).is_file():
        return TokenRows(data.pool, rows[:0])
    adapters = (Path(folder) for folder in (cli.model.base.name, *cli.model.adapters))
    network.to(cli.trainer.strategy.root_device)
    network.check_on_device()
    with network.merged():
        probe = write_probe(
            cli.folder / PROBE,
            network,
            data.pool,
            rows,
            sentence_ends(data.tokeniser.tokenizer),
            data.token_budget,
            set().union(*map(trained_ids, adapters)),
            int(cli.config["seed_everything"]),
        )
    return TokenRows(data.pool, probe.rows)


def select(argv: list[str]) -> None:
    """Two score tables -> cleaned pool."""
    parser = Parser(
        prog="tokenclean select",
        description="Two score tables and a rule -> cleaned pool.",
        usage=_USAGE,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file")
    parser.add_argument("--base", type=str | None, help="score table (or run) of the base model")
    parser.add_argument(
        "--reference", type=str | None, help="score table (or run) of the reference"
    )
    parser.add_argument("--pool", type=str | None, help="token pool; default: the tables' own")
    parser.add_argument("--round", type=int, default=1, help="round number stored with every row")
    parser.add_argument("--seed", type=int, default=0, help="of the random rule")
    parser.add_class_arguments(SelectionConfig, "selection")
    _add_place(parser)
    config = parser.parse_args(argv)
    plain = yaml.safe_load(parser.dump(config, skip_validation=True))
    settings: SelectionConfig = SelectionConfig(**config.selection.as_dict())
    folder = _folder(config, plain, "select")

    tables = {
        name: _score_table(path, name)
        for name in ("base", "reference")
        if (path := config[name]) is not None
    }
    needed = dict.fromkeys(n.partition(".")[0] for n in settings.needs)
    if missing := [t for t in needed if t != "pool" and t not in tables]:
        raise ValueError(
            f"selection.rule: {settings.rule} needs {describe_need(f'{missing[0]}.nll')}; give "
            f"{' and '.join(f'--{table}' for table in missing)}"
        )
    base, reference = tables.get("base"), tables.get("reference")
    if len({table.manifest["pool"] for table in tables.values()}) > 1:
        raise ValueError(
            "--base and --reference hold scores of different pools (fingerprints "
            f"{' and '.join(t.manifest['pool'] for t in tables.values())})"
        )
    given = config.pool or next((t.manifest["pool_folder"] for t in tables.values()), None)
    if given is None:
        raise ValueError("--pool: give the token pool, since no score table names one")
    pool_folder = Path(given)
    if (pool_folder / "train" / MANIFEST).is_file():
        pool_folder = pool_folder / "train"
    pool = TokenPool(pool_folder)
    rows = next(iter(tables.values())).rows if tables else np.arange(len(pool))
    if base and reference and not np.array_equal(base.rows, reference.rows):
        raise ValueError(
            f"--base and --reference score different rows of the pool ({len(base)} and "
            f"{len(reference)}); score the same data.subset with both models"
        )
    probes = None
    if settings.estimates_keep:
        probes = _probe(config.base, "base"), _probe(config.reference, "reference")
    together = join()
    check_processes(together.processes)
    with open_run(folder, plain):
        scored = ScoredRows(pool, rows, base, reference, config.round, probes)
        cleaned = folder / "cleaned"
        there = np.array([(cleaned / MANIFEST).is_file() and not together.rank], dtype=np.int64)
        if together.sum(there)[0]:  # a call was killed after it, or finished
            _check_found(cleaned, scored, settings, config.seed)
        else:
            clean_rows(scored, settings, config.seed, cleaned)
        if together.rank:
            return
        manifest = read_manifest(cleaned, CLEANED)
        by_reason = {}
        if settings.make().reasons:
            by_reason = {"tokens_by_reason": manifest["tokens_by_reason"]}
            log.info("%s", reasons_table(manifest))
        write_summary(
            folder,
            {
                "rule": settings.rule,
                "scope": settings.scope,
                "response_tokens": manifest["response_tokens"],
                "ranked": manifest["ranked_tokens"],
                "kept": manifest["kept_tokens"],
                **{name: manifest[name] for name in ("cut", "near_cut", "noise")},
                "rows_seen_by_reference": manifest["rows_seen_by_reference"],
                **by_reason,
                "cleaned_pool": str(cleaned),
            },
        )


def _check_found(cleaned: Path, scored: ScoredRows, settings: SelectionConfig, seed: int) -> None:
    """Refuse a cleaned pool of an earlier call that is damaged or was made of other tables."""
    stored, now = read_manifest(cleaned, CLEANED), cleaned_manifest(scored, settings, seed)
    if any(stored.get(name) != now[name] for name in ("pool", "base", "reference", "scores")):
        raise ValueError(
            f"{cleaned} was made of other score tables than these; pass another --name, or delete "
            "it to select anew"
        )
    verify(cleaned)
    log.info("%s is there already", cleaned)


def clean(argv: list[str]) -> None:
    """The whole loop."""
    begun = _begin()
    cli, loop, scoring_precision = _loop(argv, begun)
    if cli.estimate:
        planner, costs = _clean_estimate(cli, loop, scoring_precision)
        print(planner.report(costs))
        return
    with open_run(cli.folder, cli.plain):
        loop.prepare()
        names = [name for name in (loop.loop.reference, loop.loop.warmup) if name is not None]
        with loop.exchange.together():
            if cli.trainer.is_global_zero:
                check_inputs(cli.folder, _inputs(cli, cli.model.base, names))
        if not (cli.folder / SUMMARY).is_file():
            costs = _clean_estimate(cli, loop, scoring_precision, timed=False)[1]
            check_room(cli.folder, costs)
        summary = loop.run()
        results = summary.pop("results")
        loop.ledger.store()
        if cli.trainer.is_global_zero:
            print(f"\n{results_markdown(results)}\n{loop.ledger.markdown()}")
            write_summary(cli.folder, {**summary, **loop.ledger.summary()})


def clean_costs(argv: list[str]) -> list[Cost]:
    """What a call of `clean` would cost, stage by stage; it tokenises and runs nothing."""
    return _clean_estimate(*_loop(argv, _begin()))[1]


def fit_costs(argv: list[str]) -> list[Cost]:
    """What a call of `fit` would cost; it tokenises and runs nothing."""
    _begin()
    cli = _Cli("fit", CleanedSFTModule, argv, _TRAINING_PRECISION)
    cli.attach_tokenizer(cli.model.base)
    return _fit_estimate(cli, cli.model)[1]


def loop_of(argv: list[str]) -> CleaningLoop:
    """The loop that the options of `clean` ask for; nothing is run, and no folder is opened."""
    return _loop(argv, _begin())[1]


def _loop(argv: list[str], begun: float) -> tuple[_Cli, CleaningLoop, str]:
    """The loop that the options of `clean` ask for, and the precision that it scores in."""
    cli = _Cli("clean", CleanedSFTModule, argv, _TRAINING_PRECISION)
    config = cli.config_init
    mixed = "mixed" in str(config["trainer"]["precision"])
    scoring_precision = "16-mixed" if _ON_GPU and mixed else "32-true"

    def make_module() -> CleanedSFTModule:
        module: CleanedSFTModule = cli.parser.instantiate_classes(cli.config)["model"]
        return module

    def make_trainer(
        log_folder: Path | None = None, scoring: bool = False, **changes: Any
    ) -> Trainer:
        # A used Trainer keeps its loops' state, and so may callbacks: each run gets new ones.
        kwargs = copy.deepcopy(dict(config["trainer"]))
        kwargs.update({"enable_checkpointing": False, "default_root_dir": str(cli.folder)})
        if log_folder is not None and kwargs.get("logger") is None:
            changes["logger"] = _tensorboard(log_folder)
        if scoring:
            kwargs.update(precision=scoring_precision)
        return Trainer(**{**kwargs, **changes})

    if not cli.estimate:
        _join_processes(cli.trainer)
    cli.attach_tokenizer(cli.model.base)
    loop = CleaningLoop(
        make_module,
        make_trainer,
        cli.datamodule,
        config["selection"],
        config["loop"],
        cli.folder,
        int(config["seed_everything"]),
        cli.ledger(begun),
        config["attributes"],
    )
    return cli, loop, scoring_precision


def _clean_estimate(
    cli: _Cli, loop: CleaningLoop, scoring_precision: str, timed: bool = True
) -> tuple[Planner, list[Cost]]:
    pool = cli.prepared() if timed else []
    loop.check()
    planner = _planner(cli, cli.model, scoring_precision, timed)
    return planner, [*pool, *planner.clean(loop.loop, loop.selection, cli.model.save_merged)]


def _join_processes(trainer: Any) -> None:
    """Connect the processes of a loop, which no step of it can start.

    Raises:
        ValueError: if there are to be several and this one is alone.
    """
    if trainer.world_size == 1:
        return
    strategy = trainer.strategy
    if not strategy.cluster_environment.creates_processes_externally:
        command = f"torchrun --nproc_per_node={trainer.world_size} -m tokenclean clean"
        raise ValueError(
            f"trainer.devices: {trainer.world_size} processes of `clean` are started from outside: "
            f"{command} ..., or by SLURM (the README shows how)"
        )
    if not isinstance(strategy, DDPStrategy):
        raise ValueError(
            "trainer.strategy: `clean` keeps the whole base on every device (ddp); where it does "
            "not fit, run the stages by hand with `fit`, `score` and `select`"
        )
    strategy.setup_environment()


def _planner(
    cli: _Cli, module: CleanedSFTModule, scoring_precision: str, timed: bool = True
) -> Planner:
    return Planner(
        *(cli.datamodule, module.base, module.lora, cli.trainer, scoring_precision),
        *(module.gradient_checkpointing, module.weighting_scope, timed),
    )


def _fit_estimate(
    cli: _Cli, module: CleanedSFTModule, timed: bool = True
) -> tuple[Planner, list[Cost]]:
    costs = cli.prepared() if timed else []
    data: TuluDataModule = cli.datamodule
    # validation runs in the precision of training
    planner = _planner(cli, module, str(cli.trainer.precision), timed)
    rows = Rows.of(data.trained_rows())
    stack = len(module.adapters)
    cost = planner.train(cli.folder.name, rows, stack=stack, at_once=module.weighs_globally)
    if any(isinstance(callback, ModelCheckpoint) for callback in _callbacks(cli.trainer)):
        # trained float32 weights and both moments of AdamW
        cost.disk += 12 * planner.shape.trained(module.lora)
    if module.save_merged and module.lora is not None:
        cost.disk += parameter_bytes(planner.shape, planner.training.weights)
    return planner, [*costs, cost]


def _score_estimate(
    cli: _Cli, module: ScoringModule, timed: bool = True
) -> tuple[Planner, list[Cost]]:
    costs = cli.prepared() if timed else []
    data: TuluDataModule = cli.datamodule
    # of the adapters, which are not read, the paper's size is assumed
    trainer = cli.trainer
    precision = str(trainer.precision)
    planner = Planner(data, module.base, LoraSettings(), trainer, precision, timed=timed)
    rows = Rows.of(data.scored_rows())
    depth = len(module.adapters)
    costs.append(planner.score(cli.folder.name, rows, stack=depth, columns=module.columns))
    if cli.plain["probe"]:
        costs.append(planner.probe(cli.folder.name, rows, stack=depth)[-1])
    return planner, costs


def _inputs(cli: _Cli, base: BaseConfig, models: list[str]) -> dict[str, str]:
    """What the content of the data and of the models is known by, once the data are set up."""
    data: TuluDataModule = cli.datamodule
    tables: dict[str, ArrowTable | None] = {
        "data.path": data.table,
        "data.validation_path": data.validation,
        "data.test_path": data.test,
    }
    return {
        **{
            option: hashlib.sha256(str(sorted(table.manifest.items())).encode()).hexdigest()[:16]
            for option, table in tables.items()
            if table is not None
        },
        **{name: content_of(name) for name in (base.name, *models)},
    }


def _shape(base: BaseConfig) -> ModelShape:
    return ModelShape.of_config(load_config(base), base.trust_remote_code)


def _check_arms(files: list[str]) -> None:
    """Refuse two files that both give arms: the last one's would silently be the only ones."""
    giving = [f for f in files if "arms" in ((read_yaml(f) or {}).get("loop") or {})]
    if len(giving) > 1:
        raise ValueError(
            f"loop.arms: {' and '.join(giving)} both give arms, and only the last one's would be "
            "run; put the arms you want into one file, as configs/clean/all_arms.yaml does"
        )


def _add_place(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--name", type=str | None, help="run folder's name; default: config stem and hash"
    )
    parser.add_argument("--outputs", type=str, default="outputs", help="where run folders are")


def _folder(config: Any, plain: dict[str, Any], verb: str) -> Path:
    files = config.get("config") or []
    stem = "-".join(dict.fromkeys(Path(str(file)).stem for file in files)) or verb
    if config["name"] is None:
        safe_name(stem, "--config")
    else:
        safe_name(config["name"], "--name")
    return run_folder(config["outputs"], config["name"], stem, plain)


def _tensorboard(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(save_dir=str(folder), name="tensorboard", version="")


def _callbacks(trainer: Any) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def _probe(path: str, option: str) -> Probe:
    for folder in (Path(path) / PROBE, Path(path).parent / PROBE):
        if (folder / MANIFEST).is_file():
            return Probe.read(folder)
    if _score_table(path, option).manifest.get("imported"):
        raise ValueError(
            f"selection.keep: auto needs a probe of --{option}, and {path} was made from "
            "log-probabilities computed elsewhere, which have none; give a number"
        )
    raise ValueError(
        f"selection.keep: auto needs a probe of --{option}, and {path} has none; score it with "
        "--probe true (both models, with the same data.subset), or give a number"
    )


def _score_table(path: str, option: str) -> ScoreTable:
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"--{option}: {path} does not exist")
    if (folder / "scores" / MANIFEST).is_file():
        folder = folder / "scores"
    return ScoreTable(folder)


def _mean(table: ScoreTable) -> float:
    total = sum(float(values.sum(dtype="float64")) for _, _, values in table.nll.blocks())
    return total / max(int(table.manifest["tokens"]), 1)


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _begin() -> float:
    """Set the messages up; when the call began, by `time.perf_counter`, imports included."""
    global import_seconds
    _quieten()
    begun = time.perf_counter() - import_seconds
    import_seconds = 0.0  # a study calls many verbs and imports once
    return begun


def _quieten() -> None:
    """Our own messages in full; the frameworks' chatter about things we chose on purpose, not."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.WARNING if process_rank() else logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LightningCLI's args parameter is intended.*",
        ".*gradient_checkpointing.* is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*does not have many workers.*",
        ".*Couldn't infer the batch indices.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*`training_step` returned `None`.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*You passed a `val_dataloader` but have no `validation_step`.*",
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)
