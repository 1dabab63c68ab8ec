"""The loop driver: score, select, train, again.

Fixed-model and self-evolving cleaning are two schedules of one loop. Every step leaves a folder
that appears only when it is complete, so a run that was cut off goes on where it stopped, inside a
pass after its last shard and inside a training after its last checkpoint. Several processes go
through the loop in step: they share the passes, the selection and the training; the first one
writes, and says what is there already.

    outputs/<run>/
      config.yaml  log.txt  summary.json  results.md  results.json  costs.md  costs.json
      scores/base/            every row of the pool under theta_0, shared by all arms
      scores/warmup/          every row under the warm-up model, if an arm asks for it
      scores/reference/       the same under the model that loop.reference names instead
      warmup/                 cleaned/ (D_0, all kept), adapter/ (theta_1)
      arms/<arm>/cleaned/     the arm's cleaned pool
      arms/<arm>/adapter/     the arm's model: the base plus this one adapter (after full
                              fine-tuning, here and below, a whole model)
      arms/<arm>/result.json  what was measured of it
      arms/<arm>/answers.json which test questions its model answers right
      halves/without_<h>/     cross-fitted: cleaned/ (the other half, all kept), adapter/
      scores/half_<h>/        cross-fitted: a half's rows under that model
      scores/<table>_probe/   keep: auto: base/ and reference/, see scoring/probe.py
      arms/<arm>/half_<h>/    cross-fitted: cleaned/ (that half)
      arms/<arm>/round_<t>/   self-evolving: scores/ (under theta_t), cleaned/ (D_t), adapter/,
                              panel/ (the same rows in every round: scores/, cleaned/)
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from lightning import seed_everything

from tokenclean.arrow import ROWS_PER_SHARD
from tokenclean.cleaning.apply import ScoredRows, add_up, clean, reasons_table
from tokenclean.cleaning.arms import Arm, LoopConfig, Schedule, halves, panel_rows
from tokenclean.cleaning.results import ANSWERS, RESULT, ArmResult, write_results
from tokenclean.costs import (
    SHARED,
    Cost,
    Ledger,
    Stage,
    charge_scoring,
    charge_training,
    directory_bytes,
    tokenise,
)
from tokenclean.data.cleaned import KIND as CLEANED
from tokenclean.data.cleaned import CleanedPool, cleaned_schema, kept_share, write_cleaned_pool
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.data.pool import TokenPool
from tokenclean.data.rows import TokenRows
from tokenclean.data.template import vocabulary_hash
from tokenclean.estimate import ModelShape
from tokenclean.evaluation.planted import accuracy, check_answers, mask_quality, mean_nll
from tokenclean.models import (
    TRAINED_IDS,
    BaseConfig,
    Network,
    adapter_folders,
    check_layer,
    load_tokenizer,
    trained_ids,
)
from tokenclean.models.loading import load_config
from tokenclean.publish import (
    MANIFEST,
    complete_folder,
    publish_link,
    read_manifest,
    verify,
    write_json,
)
from tokenclean.scoring.attributes import AttributeSettings
from tokenclean.scoring.cache import ScoreCache
from tokenclean.scoring.module import ScoringModule, score_pool
from tokenclean.scoring.probe import Probe, sentence_ends, share, write_probe
from tokenclean.scoring.shards import discard_shards
from tokenclean.scoring.table import Column, ScoreTable
from tokenclean.selection.exchange import here
from tokenclean.selection.noise import PARTNERS
from tokenclean.selection.rule import columns_needed
from tokenclean.selection.select import SelectionConfig
from tokenclean.trainer import Trainer
from tokenclean.training.module import CleanedSFTModule

log = logging.getLogger(__name__)


class CleaningLoop:
    """Runs every arm of a configuration over one base in memory, of each process its own.

    Where `torch.distributed` is initialised all its processes run it together; they see one file
    system.

    Args:
        make_module: a new `CleanedSFTModule` with the run's settings.
        make_trainer: a new Lightning Trainer; takes the changes to the run's trainer settings.
        data: the data module, with its tokenizer set.
        selection: keep share and options that the arms share.
        loop: arms and schedules.
        folder: the run folder.
        seed: of adapters, dropout and the random rule.
        ledger: where its costs go.
        attributes: what some columns of score tables rest on.
    """

    def __init__(
        self,
        make_module: Callable[[], CleanedSFTModule],
        make_trainer: Callable[..., Trainer],
        data: TuluDataModule,
        selection: SelectionConfig,
        loop: LoopConfig,
        folder: Path,
        seed: int,
        ledger: Ledger,
        attributes: AttributeSettings | None = None,
    ):
        self.make_module, self.make_trainer = make_module, make_trainer
        self.data, self.selection, self.loop = data, selection, loop
        self.folder, self.seed, self.ledger = folder, seed, ledger
        self.exchange = here()
        self.attributes = attributes or AttributeSettings()
        self.template = make_module()
        if self.template.adapters:
            raise ValueError("model.adapters: `clean` starts from the bare base; leave them out")
        if self.template.lora is None and loop.score_base == "previous":
            raise ValueError("loop.score_base: previous needs LoRA rounds, not full fine-tuning")
        if self.template.weighting is not None:
            raise ValueError(
                "model.weighting: `clean` trains warm-up and references without weights; give it "
                "to an arm, as loop.arms.<name>.weighting"
            )
        module = make_module()
        for arm in loop.arms.values():
            module.use_weighting(arm.weighting, arm.weighting_options)
        # What can be refused now need not wait until the pool is tokenised.
        for column in self._columns("base") or []:
            self.attributes.check(column)
        self._device = make_trainer(logger=False).strategy.root_device
        self._network: Network | None = None
        # Full fine-tuning changes the weights in place: theta_0 must then be read again.
        self._holds_base = True
        #: folders this call has made or named
        self._known: set[Path] = set()

    @property
    def pool(self) -> TokenPool:
        return self.data.pool

    @property
    def full_tuning(self) -> bool:
        return self.template.lora is None

    def prepare(self) -> None:
        """Open the data, tokenised where they were not, and refuse what does not go with them."""
        with self._alone() as first:
            if first:
                tokenise(self.data, self.ledger)
        if not first:
            self.data.setup()
        self.check()

    def run(self) -> dict[str, Any]:
        """Every arm in order, once `prepare` was called.

        Returns:
            The run's summary and, as ``results``, the arms'.
        """
        parts = self.data.subset_rows()
        # Bad ones are to be found now, not after a pass over the pool.
        _ = self.reference
        self._check_warmup(parts[0])
        results = [self._evaluated("base", self.folder / "base", [])]
        if self._columns("base") is not None:
            self._base_scores()
        if any(a.needs_warmup(self.loop.reference) for a in self.loop.arms.values()):
            self._warm_up(parts[0])
        for name, arm in self.loop.arms.items():
            log.info("arm %s: %s", name, arm.describe(self.selection))
            results.append(self._arm(name, arm, parts))
            self._write_results(results)
        self._write_results(results)
        return {
            "samples": len(self.pool),
            "response_tokens": int(self.pool.response_counts().sum()),
            "arms": len(results),
            "results": results,
        }

    def _write_results(self, results: list[ArmResult]) -> None:
        with self._alone() as first:
            if first:
                write_results(self.folder, results)

    def check(self) -> None:
        """Refuse arms that do not go with the data, which must be set up.

        Raises:
            ValueError: naming the option.
        """
        self.data.refuse_prompts()
        needs = {n: a.needs(self.selection) for n, a in self.loop.arms.items()}
        rated = [n for n, found in needs.items() if "pool.quality" in found]
        if rated and self.data.order == "shuffle":
            raise ValueError(
                f"loop.arms: {', '.join(rated)} needs a rating of every sample; name its column "
                "with data.order"
            )
        needs_truth = [n for n, found in needs.items() if "pool.truth" in found]
        config = load_config(self.template.base).get_text_config()
        if "attention" in (self._columns("base") or []):
            check_layer(self.attributes.depth(config), config, "attributes.layer")
        for name, arm in self.loop.arms.items():
            if arm.selection(self.selection).estimates_keep and (reason := self.no_probes(arm)):
                raise ValueError(f"selection.keep: auto: {reason}; give the arm {name} a number")
            online = arm.make_weighting()
            if online is not None and online.reads_prompt:
                layer = online.attention_layer(config)
                check_layer(layer, config, f"loop.arms.{name}.weighting_options: layer")
            if arm.rule == "forgetting" and self.data.reduction == "published":
                raise ValueError(
                    f"data.reduction: published does not go with the arm {name}, whose rule "
                    "unlearns tokens; use tokens"
                )
        if needs_truth and not self.pool.has_truth:
            raise ValueError(
                f"loop.arms: {', '.join(needs_truth)} keeps tokens by planted truth, which this "
                "pool does not have"
            )
        if self.loop.reference and not any(
            a.schedule == "fixed_model" and a.needs_reference for a in self.loop.arms.values()
        ):
            raise ValueError("loop.reference: no arm uses it; it scores for fixed-model arms")
        if self.data.subset is not None:
            raise ValueError("data.subset: `clean` uses every part; leave it out")
        if self.data.subsets < 2 and any(
            a.schedule == "self_evolving" for a in self.loop.arms.values()
        ):
            raise ValueError("data.subsets: self-evolving cleaning needs at least 2 parts")

    # -- models -------------------------------------------------------------------------------

    @property
    def network(self) -> Network:
        """The base, loaded when it is first needed: a finished run loads nothing."""
        if self._network is None:
            self._network = Network.load(self.template.base, self._device, full=self.full_tuning)
            self.data.layout = self._network.layout
        return self._network

    def _at_base(self) -> Network:
        if self.full_tuning and not self._holds_base:
            self._network = None
        if not self.full_tuning:
            self.network.drop_adapters()
        self._holds_base = True
        return self.network

    def _at(self, folders: list[Path]) -> Network:
        """theta_0 plus the adapters in these folders (full fine-tuning: the last one's weights)."""
        if self.full_tuning:
            if folders:
                base = replace(self.template.base, name=str(folders[-1]), tokenizer=None)
                self._network = Network.load(base, self._device, full=True)
                self._holds_base = False
                return self._network
            return self._at_base()
        network = self._at_base()
        for folder in folders:
            self._say_if_found(folder)
            network.load_adapter(folder)
        network.freeze()
        return network

    def fresh_adapter(self) -> Network:
        """theta_0 under a new LoRA, where it computes, ready for gradients and without dropout."""
        assert self.template.lora is not None
        network = self._at_base()
        self._holds_base = False
        seed_everything(self.seed, verbose=False)
        network.add_adapter(self.template.lora)
        return network.to(self._device).eval()

    # -- processes ----------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """A block whose work is the first process's: whether this is the one.

        All enter it, and leave it together once the work is done.
        """
        with self.exchange.together():
            yield self.exchange.rank == 0

    def _agreed(self, fact: bool) -> bool:
        """What is true for the first process: the others may look sooner or later than it does."""
        mine = np.array([fact and self.exchange.rank == 0], dtype=np.int64)
        return bool(self.exchange.sum(mine)[0])

    def _has(self, folder: Path) -> bool:
        """Whether a folder is there, whole."""
        return self._agreed((folder / MANIFEST).is_file())

    def _is_trained(self, step: Path) -> bool:
        found = self._agreed(_is_trained(step))
        if found and not self.exchange.rank:
            # of a call that was killed before it had done so
            shutil.rmtree(step / "checkpoints", ignore_errors=True)
        return found

    # -- steps --------------------------------------------------------------------------------

    def _base_scores(self) -> ScoreTable:
        rows = np.arange(len(self.pool))
        folder = self.folder / "scores" / "base"
        columns = self._columns("base")
        return self._score(folder, rows, lambda: self._at_base(), [], columns=columns, shared=True)

    def _columns(self, table: str, schedule: Schedule | None = None) -> list[str] | None:
        """What the arms (of a schedule) need of a table besides losses; None: not the table."""
        arms = [a for a in self.loop.arms.values() if schedule in (None, a.schedule)]
        needs = [need for arm in arms for need in arm.needs(self.selection)]
        return columns_needed(needs, table)

    def _warm_up(self, rows: np.ndarray) -> None:
        """theta_1: the base trained on every response token of D_0."""
        step = self.folder / "warmup"
        if self.loop.warmup is not None:
            # Links inside a folder of our own: what is measured here must not land there.
            with self._alone() as first:
                for part in ("cleaned", "adapter") if first else ():
                    step.mkdir(exist_ok=True)
                    if not (step / part).is_symlink():
                        target = (Path(self.loop.warmup) / part).resolve()
                        publish_link(step / part, target)
        self._clean(
            ScoredRows(self.pool, rows, None, None, round=0), SelectionConfig(rule="full"), step
        )
        if not self._is_trained(step):
            log.info("warm-up on D_0: %d samples", len(rows))
            self._at_base()
            epochs, rate = self.loop.warmup_epochs, self.loop.warmup_learning_rate
            self._train(step, [], round_number=0, epochs=epochs, learning_rate=rate)
        if self.loop.evaluate_rounds:
            self._evaluated("warmup", step, [step / "adapter"], is_arm=False)

    def _check_warmup(self, rows: np.ndarray) -> None:
        """Refuse another run's warm-up before anything is computed.

        Raises:
            ValueError: if it is unused, unfinished, or was trained on anything but this D_0.
        """
        if self.loop.warmup is None or self._agreed((self.folder / "warmup").exists()):
            return
        if not any(a.needs_warmup(self.loop.reference) for a in self.loop.arms.values()):
            raise ValueError("loop.warmup: no arm uses it; leave it out")
        folder = Path(self.loop.warmup)
        counts = self.pool.response_counts()[rows]
        ids = set(self.pool.ids.take(rows[counts > 0]).to_pylist())
        if not _is_trained(folder) or not (folder / "cleaned" / MANIFEST).is_file():
            raise ValueError(
                f"loop.warmup: {folder} is not the `warmup` folder of a run, or not finished"
            )
        pool = read_manifest(folder / "cleaned", CLEANED)["pool"]
        if pool != self.pool.fingerprint or set(trained_ids(folder / "adapter")) != ids:
            raise ValueError(
                f"loop.warmup: {folder} was trained on other samples than this run's D_0; leave it "
                "out, or set data.path, data.seed and data.subsets as they were there"
            )

    def _reference_scores(self) -> ScoreTable:
        """The whole pool under the reference of every fixed-model arm."""
        rows = np.arange(len(self.pool))
        columns = self._columns("reference", "fixed_model")
        base = self._against("fixed_model")
        if self.reference is None:
            adapter = self.folder / "warmup" / "adapter"
            folder = self.folder / "scores" / "warmup"
            return self._score(
                folder,
                rows,
                lambda: self._at([adapter]),
                [adapter],
                against=base,
                columns=columns,
                shared=True,
            )
        folder, (config, adapters) = self.folder / "scores" / "reference", self.reference
        if config is self.template.base and not self.full_tuning:
            return self._score(
                folder, rows, lambda: self._at(adapters), adapters, against=base, columns=columns
            )
        # Another model: beside the base in memory while it scores.
        ours = self._network
        try:
            if not self._has(folder):
                self._network = Network.load(config, self._device)
                for adapter in adapters:
                    self._network.load_adapter(adapter)
                self.data.layout = self._network.layout
            return self._score(
                folder,
                rows,
                lambda: self.network,
                adapters,
                against=base,
                columns=columns,
                base=config,
            )
        finally:
            self._network = ours
            if ours is not None:
                self.data.layout = ours.layout

    def _against(self, schedule: Schedule) -> ScoreTable | None:
        """The base's table, where an arm of the schedule compares a reference with it."""
        needs = [a.needs(self.selection) for a in self.loop.arms.values() if a.schedule == schedule]
        both = any({"base.nll", "reference.nll"} <= set(found) for found in needs)
        return self._base_scores() if both else None

    @cached_property
    def reference(self) -> tuple[BaseConfig, list[Path]] | None:
        """Base and adapters of the model that ``loop.reference`` names.

        Raises:
            ValueError: if it is no plain LoRA adapter and no model with the base's vocabulary.
        """
        name = self.loop.reference
        if name is None:
            return None
        if (Path(name) / "model" / "config.json").is_file():
            name = str(Path(name) / "model")
        elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            return self.template.base, [Path(f) for f in adapter_folders(name)]
        config = replace(self.template.base, name=name, tokenizer=None)
        vocabulary = vocabulary_hash(load_tokenizer(config))
        if vocabulary != vocabulary_hash(self.data.tokeniser.tokenizer):
            raise ValueError(
                f"loop.reference: {name} has another vocabulary than the base "
                f"{self.template.base.name}, so their losses are not of the same tokens"
            )
        return config, []

    def _score(
        self,
        folder: Path,
        rows: np.ndarray,
        get_network: Callable[[], Network],
        adapters: list[Path],
        depth: int | None = None,
        against: ScoreTable | None = None,
        columns: list[str] | None = None,
        shared: bool = False,
        base: BaseConfig | None = None,
    ) -> ScoreTable:
        """A score table of the run, made if it is not there yet.

        Args:
            folder: where it is.
            rows: pool rows to score.
            get_network: the model, asked for only if it must run.
            adapters: what is stacked on the base in it.
            depth: how many of the stack count; all by default.
            against: the base's table, for a reference.
            columns: what it holds besides losses, see `Column`.
            shared: whether other runs may need the same table.
            base: the model below the adapters, if it is not the run's own base.
        """
        if not self._has(folder):
            network = get_network()
            depth = network.depth if depth is None else depth
            with self._measured("score", folder) as cost, network.at_depth(depth):
                token_rows = TokenRows(self.pool, rows)
                module = ScoringModule(
                    base or self.template.base,
                    columns=cast(list[Column], columns),
                    attributes=self.attributes,
                )
                # After full fine-tuning these are whole models.
                module.adapters = [str(a) for a in adapters]
                module.network = network
                ran = score_pool(
                    module,
                    self.make_trainer(logger=False, scoring=True),
                    self.data,
                    token_rows,
                    folder,
                    self.data.token_budget,
                    ScoreCache(self._cache / "scores") if shared else None,
                    against,
                )
                if ran:
                    charge_scoring(cost, self.shape, token_rows)
                    log.info("scored %d samples into %s", len(rows), folder)
                cost.disk = directory_bytes([folder])
            self._known.add(folder)
        discard_shards(folder)  # of a call that was killed before it had done so
        self._say_if_found(folder)
        return ScoreTable(folder)

    def _train(
        self,
        step: Path,
        stand_on: list[Path],
        round_number: int,
        epochs: int | None = None,
        learning_rate: float | None = None,
        arm: Arm | None = None,
    ) -> None:
        """Train what is in memory on ``step/cleaned``; ``step/adapter`` gets the new weights.

        The seed depends on the round alone: arms differ in what they train on and how it is
        weighted, nothing else.
        """
        network = self.network
        self._holds_base = False
        seed_everything(self.seed + round_number, verbose=False)
        module = self.make_module()
        module.network, module.learning_rate = network, learning_rate
        if arm is not None:
            module.use_weighting(arm.weighting, arm.weighting_options)
        if self.loop.continue_adapter and network.stack:
            module.continue_round()
        else:
            module.start_round()
        changes: dict[str, Any] = {} if epochs is None else {"max_epochs": epochs}
        trainer = self.make_trainer(log_folder=step, **changes)
        checkpoints = step / "checkpoints"
        with self._measured("train", step) as cost:
            rows = TokenRows(self._cleaned(step))
            trainer.fit_within(
                checkpoints,
                module,
                self.data.training_loader(rows, module.carry),
                None if self.data.validation is None else self.data.val_dataloader(),
            )
            network.freeze()
            ids = set(rows.ids_with_targets()).union(*(trained_ids(before) for before in stand_on))
            with self._alone() as first:
                if first:
                    with complete_folder(step / "adapter") as partial:
                        if self.full_tuning:
                            network.save_merged(partial, self.data.tokeniser.tokenizer)
                        else:
                            network.save_last_adapter(partial)
                        write_json(partial / TRAINED_IDS, sorted(ids))
                    shutil.rmtree(checkpoints, ignore_errors=True)
            self._known.add(step / "adapter")
            charge_training(cost, self.shape, self.data, rows, trainer, module.lora)
            cost.disk = directory_bytes([step / "adapter"])

    # -- arms ---------------------------------------------------------------------------------

    def _arm(self, name: str, arm: Arm, parts: list[np.ndarray]) -> ArmResult:
        folder = self.folder / "arms" / name
        folder.mkdir(parents=True, exist_ok=True)
        if arm.schedule == "warmup":
            adapter = self.folder / "warmup" / "adapter"
            with self._alone() as first:
                if first and not _is_trained(folder):
                    publish_link(folder / "adapter", Path("..", "..", "warmup", "adapter"))
            return self._evaluated(name, folder, [adapter])
        selection = arm.selection(self.selection)
        if arm.schedule == "fixed_model":
            adapters = [self._fixed(arm, selection, folder)]
        elif arm.schedule == "cross_fitted":
            adapters = [self._cross_fitted(arm, selection, folder, parts)]
        else:
            adapters = self._rounds(arm, selection, folder, parts)
            steps = [self.folder / "warmup", *(folder / f"round_{t}" for t in range(1, len(parts)))]
            self._join(folder, steps, arm, selection)
            self._publish(folder, adapters)
        return self._evaluated(name, folder, adapters, self._cleaned(folder))

    def _fixed(self, arm: Arm, selection: SelectionConfig, folder: Path) -> Path:
        """Select once over the whole pool and train theta_0 on it."""
        base = self._base_scores() if self._asks(arm, "base") else None
        reference = self._reference_scores() if self._asks(arm, "reference") else None
        rows = np.arange(len(self.pool))
        probes = self._fixed_probes() if selection.estimates_keep else None
        scored = ScoredRows(self.pool, rows, base, reference, round=1, probes=probes)
        self._clean(scored, selection, folder)
        if not self._is_trained(folder):
            self._at_base()
            self._train(folder, [], round_number=1, arm=arm)
        return folder / "adapter"

    def _cross_fitted(
        self, arm: Arm, selection: SelectionConfig, folder: Path, parts: list[np.ndarray]
    ) -> Path:
        """`_fixed` with a reference per half of the pool, trained on the other half."""
        base = self._base_scores() if self._asks(arm, "base") else None
        split = halves(parts)
        steps = [folder / "half_1", folder / "half_2"]
        for number, (step, rows) in enumerate(zip(steps, split, strict=True), start=1):
            reference = self._half_scores(number, rows, split[2 - number])
            probes = self._half_probes(number, rows) if selection.estimates_keep else None
            scored = ScoredRows(self.pool, rows, base, reference, round=1, probes=probes)
            if scored.seen.any():
                raise RuntimeError(f"half {number} is scored by a model that was trained on it")
            self._clean(scored, selection, step)
        self._join(folder, steps, arm, selection)
        if not self._is_trained(folder):
            self._at_base()
            self._train(folder, [], round_number=1, arm=arm)
        return folder / "adapter"

    def _half_scores(self, number: int, rows: np.ndarray, other: np.ndarray) -> ScoreTable:
        """One half of the pool under the base trained on every response token of the other."""
        step = self.folder / "halves" / f"without_{number}"
        self._clean(
            ScoredRows(self.pool, other, None, None, round=0), SelectionConfig(rule="full"), step
        )
        if not self._is_trained(step):
            log.info("reference of half %d: %d other samples", number, len(other))
            self._at_base()
            self._train(step, [], round_number=0, epochs=self.loop.half_epochs)
        return self._score(
            self.folder / "scores" / f"half_{number}",
            rows,
            lambda: self._at([step / "adapter"]),
            [step / "adapter"],
            against=self._against("cross_fitted"),
            columns=self._columns("reference", "cross_fitted"),
        )

    def _asks(self, arm: Arm, table: str) -> bool:
        return columns_needed(arm.needs(self.selection), table) is not None

    def _rounds(
        self, arm: Arm, selection: SelectionConfig, folder: Path, parts: list[np.ndarray]
    ) -> list[Path]:
        """Rounds 1 ... T; returns the adapters that make up the final model, oldest first."""
        stack = [self.folder / "warmup" / "adapter"]
        in_memory = False
        for number, rows in enumerate(parts[1:], start=1):
            step = folder / f"round_{number}"
            if not in_memory and not self._is_trained(step):
                self._at(stack)
                in_memory = True
            base = reference = None
            if self._asks(arm, "base"):
                base = self._round_base(step, rows, stack)
            if self._asks(arm, "reference"):
                reference = self._score(
                    step / "scores",
                    rows,
                    lambda: self.network,
                    stack,
                    against=base,
                    columns=columns_needed(arm.needs(self.selection), "reference"),
                )
            probes = self._round_probes(step, rows, stack) if selection.estimates_keep else None
            scored = ScoredRows(self.pool, rows, base, reference, round=number, probes=probes)
            if scored.seen.any():
                raise RuntimeError(f"round {number} scores rows that its reference was trained on")
            self._clean(scored, selection, step)
            if reference is not None and self.loop.has_panel(len(parts) - 1):
                self._panel(step, parts, number, stack, arm, selection, probes)
            if not self._is_trained(step):
                self._train(step, stack, number, arm=arm)
            stack = [step / "adapter"] if self._replaces else [*stack, step / "adapter"]
            if self.loop.evaluate_rounds:
                pool = self._cleaned(step)
                self._evaluated(f"round_{number}", step, stack, pool, is_arm=False)
        return stack

    def _panel(
        self,
        step: Path,
        parts: list[np.ndarray],
        number: int,
        stack: list[Path],
        arm: Arm,
        selection: SelectionConfig,
        probes: tuple[Probe, Probe] | None,
    ) -> None:
        """Score and mask the same rows under every round's reference, which is in memory after."""
        place = step / "panel"
        if self._has(place / "cleaned"):
            return
        if self._is_trained(step):  # by a call that was cut off, or without a panel
            self._at(stack)
        rows = panel_rows(parts, self.loop.panel, self.data.seed)
        base = self._round_base(place, rows, stack) if self._asks(arm, "base") else None
        reference = self._score(
            place / "scores",
            rows,
            lambda: self.network,
            stack,
            columns=columns_needed(arm.needs(self.selection), "reference"),
        )
        scored = ScoredRows(self.pool, rows, base, reference, round=number, probes=probes)
        with self._measured("select", place) as cost:
            # Whatever it keeps: nothing is trained on it.
            selected = clean(scored, selection, self.seed + number, place / "cleaned")
            cost.samples, cost.targets = len(rows), selected.tokens
            cost.disk = directory_bytes([place / "cleaned"])

    # -- probes, for keep: auto ---------------------------------------------------------------

    def probes(self, name: str) -> list[tuple[Probe, Probe]]:
        """Of base and reference, for every step of an arm that has them; made if need be.

        The pool must be set up, and the models trained.
        """
        arm, parts = self.loop.arms[name], self.data.subset_rows()
        if not arm.needs_reference:
            return []
        if arm.schedule == "fixed_model":
            return [self._fixed_probes()]
        if arm.schedule == "cross_fitted":
            return [self._half_probes(h, rows) for h, rows in enumerate(halves(parts), start=1)]
        found, stack = [], [self.folder / "warmup" / "adapter"]
        for number, rows in enumerate(parts[1:], start=1):
            step = self.folder / "arms" / name / f"round_{number}"
            found.append(self._round_probes(step, rows, stack))
            stack = [step / "adapter"] if self._replaces else [*stack, step / "adapter"]
        return found

    def no_probes(self, arm: Arm) -> str | None:
        """Why an arm's informative share cannot be estimated, if it cannot."""
        if arm.schedule != "fixed_model" or self.reference is None:
            return None
        config, _ = self.reference
        if config is self.template.base:
            return None
        return (
            "it takes a reference that was trained from the base, and loop.reference names "
            f"another model, {config.name}"
        )

    def _fixed_probes(self) -> tuple[Probe, Probe]:
        """Of theta_0 and the reference of fixed-model arms, on rows that it has not seen."""
        if self.reference is None:
            name, adapters = "warmup", [self.folder / "warmup" / "adapter"]
        else:
            name, (_, adapters) = "reference", self.reference
        rows = np.flatnonzero(~self.pool.ids.among(_trained_on(adapters)))
        return self._probes(self.folder / "scores" / f"{name}_probe", rows, [], adapters)

    def _half_probes(self, number: int, rows: np.ndarray) -> tuple[Probe, Probe]:
        """Of theta_0 and the model that has not seen a half, on that half's rows."""
        adapter = self.folder / "halves" / f"without_{number}" / "adapter"
        return self._probes(self.folder / "scores" / f"half_{number}_probe", rows, [], [adapter])

    def _round_probes(self, step: Path, rows: np.ndarray, stack: list[Path]) -> tuple[Probe, Probe]:
        """Of a round's base and reference; the reference is in memory afterwards."""
        before = [] if self.loop.score_base == "theta_0" else stack[:-1]
        return self._probes(step / "probe", rows, before, stack)

    def _probes(
        self, folder: Path, rows: np.ndarray, base: list[Path], reference: list[Path]
    ) -> tuple[Probe, Probe]:
        """Probes of two models on the same draw of rows, made where they are not there yet.

        Args:
            folder: gets ``base/`` and ``reference/``.
            rows: among which to draw.
            base, reference: what is stacked on theta_0.
        """
        found = []
        for name, adapters in (("base", base), ("reference", reference)):
            place = folder / name
            if not self._has(place):
                network = self._at(adapters)
                measured = self._measured("score", folder, alone=True)
                with measured as cost, self._alone() as first:
                    if first:
                        network.to(self._device)
                        network.check_on_device()
                        with network.merged():
                            probe = write_probe(
                                place,
                                network,
                                self.pool,
                                rows,
                                sentence_ends(self.data.tokeniser.tokenizer),
                                self.data.token_budget,
                                _trained_on(adapters),
                                self.seed,
                            )
                        once = TokenRows(self.pool, probe.rows)
                        charge_scoring(cost, self.shape, *[once] * (1 + PARTNERS))
                        cost.disk = directory_bytes([place])
            found.append(Probe.read(place))
        return found[0], found[1]

    @property
    def _replaces(self) -> bool:
        """A round's weights stand alone instead of on top of the earlier ones."""
        return self.full_tuning or self.loop.continue_adapter

    def _round_base(self, step: Path, rows: np.ndarray, stack: list[Path]) -> ScoreTable:
        if self.loop.score_base == "theta_0" or len(stack) == 1:
            return self._base_scores()
        before = stack[:-1]
        return self._score(
            step / "scores_base",
            rows,
            lambda: self.network,
            before,
            depth=len(before),
            columns=self._columns("base", "self_evolving"),
        )

    def _cleaned(self, step: Path) -> CleanedPool:
        """The cleaned pool of a step, unpacked by the first process."""
        with self._alone() as first:
            if first:
                CleanedPool(step / "cleaned", self._cache)
        return CleanedPool(step / "cleaned", self._cache)

    def _clean(self, scored: ScoredRows, selection: SelectionConfig, step: Path) -> None:
        if self._has(step / "cleaned"):
            self._say_if_found(step / "cleaned")
            self._check_kept(step, selection.rule)
            return
        step.mkdir(parents=True, exist_ok=True)
        with self._measured("select", step) as cost:
            selected = clean(scored, selection, self.seed + scored.round, step / "cleaned")
            self._known.add(step / "cleaned")
            cost.samples, cost.targets = len(scored.rows), selected.tokens
            cost.disk = directory_bytes([step / "cleaned"])
        self._check_kept(step, selection.rule)
        if selected.rule.reasons:
            log.info("%s", reasons_table(read_manifest(step / "cleaned", CLEANED)))
        log.info(
            "%s: kept %d of %d response tokens%s%s%s",
            step,
            selected.kept,
            selected.ranked,
            "" if selected.cut is None else f", cut at score {selected.cut:.6g}",
            _share_near_the_cut(selected.near_cut, scored.noise),
            f"; the reference saw {int(scored.seen.sum())} rows" if scored.seen.any() else "",
        )

    @staticmethod
    def _check_kept(step: Path, rule: str) -> None:
        manifest = read_manifest(step / "cleaned", CLEANED)
        if not manifest["kept_tokens"]:
            raise ValueError(
                f"loop.arms: the rule {rule} keeps none of the {manifest['ranked_tokens']} "
                f"response tokens of {step}; loosen its options"
            )

    def _join(self, folder: Path, steps: list[Path], arm: Arm, selection: SelectionConfig) -> None:
        """The steps' cleaned rows as one cleaned pool in pool order: rounds with D_0, or halves."""
        if self._has(folder / "cleaned"):
            return
        # Of an estimated share it needs the probes, which all processes make.
        probes = self.probes(folder.name) if selection.estimates_keep else []
        with self._alone() as first:
            if first:
                self._write_joined(folder, steps, arm, selection, probes)

    def _write_joined(
        self,
        folder: Path,
        steps: list[Path],
        arm: Arm,
        selection: SelectionConfig,
        probes: list[tuple[Probe, Probe]],
    ) -> None:
        pools = [CleanedPool(step / "cleaned", self._cache) for step in steps]
        table = pa.Table.from_batches([b for pool in pools for b in pool.batches()])
        row_of_id = {id: row for row, id in enumerate(self.pool.ids)}
        order = np.argsort([row_of_id[id] for pool in pools for id in pool.values("id")])
        kept_facts = (
            "base", "reference", "ranked_tokens", "kept_tokens", "cut", "near_cut", "noise", "share"
        )  # fmt: skip
        manifest = {
            **pools[0].manifest,
            "selection": asdict(selection),
            "schedule": arm.schedule,
            "score_base": self.loop.score_base,
            "response_tokens": sum(p.manifest["response_tokens"] for p in pools),
            "ranked_tokens": sum(p.manifest["ranked_tokens"] for p in pools),
            "kept_tokens": sum(p.manifest["kept_tokens"] for p in pools),
            # these differ from step to step and stand with each of them
            **dict.fromkeys(("base", "reference", "cut", "near_cut", "noise", "share")),
            "reasons": {k: v for p in pools for k, v in p.manifest["reasons"].items()},
            "tokens_by_reason": add_up([p.manifest["tokens_by_reason"] for p in pools]),
            "rows_seen_by_reference": sum(p.manifest["rows_seen_by_reference"] for p in pools),
        }
        facts = [{k: p.manifest[k] for k in kept_facts} for p in pools]
        if arm.schedule == "cross_fitted":
            manifest["halves"] = facts
        else:
            manifest["rounds"] = facts
            manifest["ranked_tokens"] -= facts[0]["ranked_tokens"]  # D_0 is not ranked
        if selection.estimates_keep:
            manifest["share"] = share(probes, self.pool).to_json()
        blocks = (
            batch
            for first in range(0, len(order), ROWS_PER_SHARD)
            for batch in table.take(order[first : first + ROWS_PER_SHARD])
            .combine_chunks()
            .to_batches()
        )
        with self._measured("select", folder) as cost:
            write_cleaned_pool(
                folder / "cleaned", blocks, cleaned_schema(self.pool.has_truth), manifest
            )
            cost.disk = directory_bytes([folder / "cleaned"])

    def _publish(self, folder: Path, adapters: list[Path]) -> None:
        """The arm's model as one adapter; after full fine-tuning, a link to the last round's."""
        if self._is_trained(folder):
            return
        if self.full_tuning:
            with self._alone() as first:
                if first:
                    publish_link(folder / "adapter", adapters[-1].relative_to(folder))
            return
        network = self._at(adapters)
        ids = set().union(*(trained_ids(adapter) for adapter in adapters))
        with self._measured("train", folder) as cost:
            with self._alone() as first:
                if first:
                    with complete_folder(folder / "adapter") as partial:
                        network.save_stack(partial)
                        write_json(partial / TRAINED_IDS, sorted(ids))
            cost.disk = directory_bytes([folder / "adapter"])

    def _evaluated(
        self,
        name: str,
        folder: Path,
        adapters: list[Path],
        cleaned: CleanedPool | None = None,
        is_arm: bool = True,
    ) -> ArmResult:
        """Measure an arm, or a step on its way, once; its result stays in the folder."""
        stored = folder / RESULT
        answered = self.data.test is None or (folder / ANSWERS).is_file()
        merged = self._merged_folder(folder, adapters) if is_arm else None
        done = stored.is_file() and answered and (merged is None or merged.is_dir())
        if not self._agreed(done):
            network = self._at(adapters)
            with self._alone() as first:
                if first:
                    self._evaluate(name, folder, network, cleaned, merged)
        return ArmResult.from_json(json.loads(stored.read_text(encoding="utf-8")))

    def _merged_folder(self, folder: Path, adapters: list[Path]) -> Path | None:
        """Where the arm's merged model goes, if one is asked for."""
        asked = self.template.save_merged and adapters and not self.full_tuning
        return folder / "merged" if asked else None

    def _evaluate(
        self,
        name: str,
        folder: Path,
        network: Network,
        cleaned: CleanedPool | None,
        merged: Path | None,
    ) -> None:
        """Measure what is in memory, and write its merged model where one is wanted."""
        folder.mkdir(parents=True, exist_ok=True)
        # Lightning hands weights back to the CPU after every run.
        network.to(self._device)
        network.check_on_device()
        result = ArmResult(name=name)
        with self._measured("evaluate", folder, alone=True) as cost:
            with network.merged():
                if self.data.test is not None:
                    rows = TokenRows(self.data.test)
                    answers = check_answers(network, self.data.test, self.data.planned(rows))
                    write_json(folder / ANSWERS, answers)
                    result.accuracy = accuracy(answers)
                    charge_scoring(cost, self.shape, rows)
                if self.data.validation is not None:
                    rows = self.data.validated_rows()
                    batches = self.data.planned(rows)
                    result.validation_nll = mean_nll(network, self.data.validation, batches)
                    charge_scoring(cost, self.shape, rows)
            if cleaned is not None:
                result.kept_share = kept_share(cleaned.manifest)
                if self.pool.has_truth:
                    result.mask = mask_quality(cleaned)
            if merged is not None:
                with complete_folder(merged) as partial:
                    network.save_merged(partial, self.data.tokeniser.tokenizer)
                cost.disk = directory_bytes([merged])
        write_json(folder / RESULT, result.to_json())

    def _say_if_found(self, folder: Path) -> None:
        """Tell a resumed run from a fresh one: what an earlier call left is checked and named once.

        Raises:
            ValueError: if it is not what was written.
        """
        if folder not in self._known:
            self._known.add(folder)
            with self._alone() as first:
                if first:
                    verify(folder)
            log.info("%s is there already", folder)

    @contextmanager
    def _measured(self, stage: Stage, folder: Path, alone: bool = False) -> Iterator[Cost]:
        """Charge a stage to the arm and round that its folder belongs to.

        Args:
            alone: it is the first process's, see `_alone`.

        Panels are charged to no arm: they measure, and an arm does not need them.
        """
        first, *rest = folder.relative_to(self.folder).parts
        arm = rest[0] if first == "arms" else "base" if first == "base" else SHARED
        arm = SHARED if "panel" in rest[1:] else arm
        rounds = [int(p.removeprefix("round_")) for p in rest[1:] if p.startswith("round_")]
        number = rounds[0] if rounds else 0 if first == "warmup" else None
        with self.ledger.measure(arm, stage, number, lambda: self._network, alone) as cost:
            yield cost

    @cached_property
    def shape(self) -> ModelShape:
        """Of the base: what its FLOPs follow from."""
        base = self.template.base
        return ModelShape.of_config(load_config(base), base.trust_remote_code)

    @property
    def _cache(self) -> Path:
        return self.data.cache_dir


def _share_near_the_cut(share: float | None, noise: float | None) -> str:
    if share is None or noise is None:
        return ""
    return f" ({share:.2%} within the numerical noise of it, {noise:.1e})"


def _trained_on(adapters: list[Path]) -> set[str]:
    return set().union(*(trained_ids(adapter) for adapter in adapters))


def _is_trained(step: Path) -> bool:
    return (step / "adapter" / TRAINED_IDS).is_file()
