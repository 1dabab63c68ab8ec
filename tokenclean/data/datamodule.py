"""`TuluDataModule`: from paths to pools, splits and loaders."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenclean.arrow import ArrowTable
from tokenclean.data.batches import (
    Batch,
    Layout,
    collate,
    plan_batches,
    plan_epoch,
    share_of_rank,
)
from tokenclean.data.cleaned import DATA, CleanedPool, check_tokenizer, is_cleaned_pool
from tokenclean.data.exports import check_tokenizer as check_exports
from tokenclean.data.formats import Reader, check_names
from tokenclean.data.pool import (
    OnBadLine,
    TokenPool,
    build_pool,
    data_fingerprint,
    open_pool,
    statistics_table,
)
from tokenclean.data.rows import Targets, TokenRows
from tokenclean.data.template import (
    SpecialText,
    TemplateName,
    Tokeniser,
    fingerprint_tokenizer,
)
from tokenclean.publish import MANIFEST, sweep, writing_to
from tokenclean.selection.exchange import here

log = logging.getLogger(__name__)

Reduction = Literal["tokens", "published"]
#: Tokens per forward pass, where nobody says otherwise.
GPU_BUDGET, CPU_BUDGET = 8192, 2048
#: Rows per device and step in the published training script.
PUBLISHED_ROWS = 6


@dataclass
class GlobalBatch:
    """One optimiser step's share for one process.

    Attributes:
        micro: micro-batches; the weights in them sum to 1 over all processes (for plain masks),
            and negative ones to -1 (for weights of -1).
        kept: targets in the global batch, all processes together; those of negative weight are not
            counted.
        responses: response tokens in the global batch, kept or not.
        negative: targets of negative weight in the global batch.
        key: epoch and step within it.
    """

    micro: list[Batch]
    kept: int
    responses: int
    negative: int = 0
    key: tuple[int, int] = (0, 0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GlobalBatch:
        moved = [batch.to(device, non_blocking) for batch in self.micro]
        return replace(self, micro=moved)


class TuluDataModule(LightningDataModule):
    """Samples in any usual shape -> tokenised pool -> subsets -> batches.

    Args:
        path: file (JSONL, JSON, Parquet), folder, hub name, or a list of them; for ``fit`` also a
            cleaned pool. Samples may come as tokens, `export`'s among them; see
            `tokenclean.data.pretokenised`.
        split: split of a hub data set.
        template: ``tulu`` (the paper's), ``raw`` (no tags) or ``chat`` (the tokenizer's own).
        max_length: tokens kept of each sample; the rest is cut on the right and counted.
        on_bad_line: ``stop`` after listing bad lines, or ``skip`` them into ``quarantine.jsonl``.
        special_text: what becomes of text that spells a special token: ``text`` tokenises it as
            any other text, ``refuse`` makes its row a bad line.
        id_column: column with the sample's id.
        source_column: column with the sample's source.
        subsets: parts the pool is split into, D_0 first.
        subset: part or parts to use in ``fit`` and ``score``; all by default.
        targets: tokens that ``score`` scores: ``response``, or ``prompt`` for a control table, of
            all other tokens but a sample's first. ``fit`` and ``clean`` train on responses alone.
        order: ``shuffle`` (seeded) before the split, or the name of a numeric column: rows with the
            largest values come first, so that D_0 is the best-rated part.
        validation_path: samples for the validation loss, which is that of their labels of positive
            weight where they come as tokens, else of all response tokens.
        validation_share: share of the pool held out for it instead.
        test_path: planted test set; its informative tokens are the answers that accuracy is
            measured on.
        batch_size: samples per optimiser step, over all processes.
        token_budget: tokens per forward pass; micro-batches are filled up to it. null: 8,192 on a
            machine with a GPU, 2,048 on one without, where more only leaves the processor's cache.
        cut_after_last_target: leave out what follows a sample's last target: the losses are the
            same without.
        reduction: ``tokens`` averages over the kept tokens of the global batch (Eq. 1);
            ``published`` averages per 6 rows and then over those means, as the released code does.
        seed: of the split and of the training order.
        cache_dir: where tokenised pools are kept, by content.
    """

    def __init__(
        self,
        path: str | list[str],
        split: str = "train",
        template: TemplateName = "tulu",
        max_length: int = 2048,
        on_bad_line: OnBadLine = "stop",
        special_text: SpecialText = "text",
        id_column: str = "id",
        source_column: str = "source",
        subsets: int = 5,
        subset: int | list[int] | None = None,
        targets: Targets = "response",
        order: str = "shuffle",
        validation_path: str | None = None,
        validation_share: float = 0.0,
        test_path: str | None = None,
        batch_size: int = 48,
        token_budget: int | None = None,
        cut_after_last_target: bool = True,
        reduction: Reduction = "tokens",
        seed: int = 0,
        cache_dir: str = "outputs/cache",
    ):
        super().__init__()
        self.paths = [path] if isinstance(path, str) else list(path)
        self.reader_options = {
            "split": split,
            "order_column": None if order == "shuffle" else order,
            "id_column": id_column,
            "source_column": source_column,
        }
        self.template, self.max_length, self.on_bad_line = template, max_length, on_bad_line
        self.special_text = special_text
        self.subsets, self.order, self.targets = subsets, order, targets
        self.subset = [subset] if isinstance(subset, int) else subset
        self.validation_path, self.validation_share = validation_path, validation_share
        self.test_path = test_path
        if token_budget is None:
            token_budget = GPU_BUDGET if torch.cuda.is_available() else CPU_BUDGET
        self.batch_size, self.token_budget, self.reduction = batch_size, token_budget, reduction
        self.cut = cut_after_last_target
        self.seed, self.cache_dir = seed, Path(cache_dir)
        self.layout: Layout = "packed"
        self.pad_id = 0
        self.validation: TokenPool | None = None
        self.test: TokenPool | None = None
        self._tokeniser: Tokeniser | None = None
        self._reported = False
        #: content hashes of the data, which take a pass over the files
        self._fingerprints: dict[tuple[str, ...], str] = {}
        self._check()

    def _check(self) -> None:
        if not self.paths:
            raise ValueError("data.path: no path given")
        check_names(self.paths)
        if self.subsets < 1:
            raise ValueError(f"data.subsets: {self.subsets} parts; at least 1 is needed")
        if self.subset == []:
            raise ValueError("data.subset: an empty list; leave it out to use every part")
        for part in self.subset or []:
            if not 0 <= part < self.subsets:
                raise ValueError(
                    f"data.subset: {part} is not one of the {self.subsets} parts, counted from 0"
                )
        if not 0.0 <= self.validation_share < 1.0:
            raise ValueError(f"data.validation_share: {self.validation_share} is not in [0, 1)")
        if self.validation_share and self.validation_path:
            raise ValueError("data.validation_share: give it or data.validation_path, not both")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: {self.batch_size}; at least 1 is needed")
        if self.token_budget < 1:
            raise ValueError(f"data.token_budget: {self.token_budget}; at least 1 is needed")
        if not self.cleaned_folder:
            self._reader(self.paths).check()
        for option in ("validation_path", "test_path"):
            if (extra := getattr(self, option)) and not Path(extra).exists():
                raise ValueError(f"data.{option}: {extra} does not exist")

    def _reader(self, paths: list[str], **changes: Any) -> Reader:
        return Reader(paths, **{**self.reader_options, **changes})

    @property
    def cleaned_folder(self) -> Path | None:
        """The cleaned pool that ``path`` names, itself or as the run or arm that holds it."""
        if len(self.paths) != 1:
            return None
        path = Path(self.paths[0])
        return next((p for p in (path, path / "cleaned") if is_cleaned_pool(p)), None)

    # -- pools --------------------------------------------------------------------------------

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Give the base model's tokenizer; needed before ``prepare_data``.

        Raises:
            ValueError: if data that come as tokens were exported with another one, or are a
                cleaned pool's that another one made.
        """
        extra = [path for path in (self.validation_path, self.test_path) if path]
        paths = [*self.paths, *extra]
        check_exports(paths, fingerprint_tokenizer(tokenizer))
        for path in map(Path, paths):
            if path.name == DATA and is_cleaned_pool(path.parent):
                check_tokenizer(path.parent, tokenizer)
        self._tokeniser = Tokeniser(tokenizer, self.template, self.max_length, self.special_text)
        if tokenizer.pad_token_id is not None:
            self.pad_id = tokenizer.pad_token_id

    @property
    def tokeniser(self) -> Tokeniser:
        if self._tokeniser is None:
            raise RuntimeError("TuluDataModule.use_tokenizer must be called first")
        return self._tokeniser

    def prepare_data(self) -> None:
        """Tokenise what is not tokenised yet."""
        for shelf in ("pools", "scores", "cleaned"):
            sweep(self.cache_dir / shelf, "")
        if not self.cleaned_folder:
            folder = self._pool_folder(self._reader(self.paths), self.validation_share)
            self._build(folder, self._reader(self.paths), self.validation_share, self.seed)
            if not self._reported:
                pool = open_pool(folder / "train")
                log.info("shapes found: %s", pool.manifest["shapes"])
                log.info("pool %s\n%s", folder / "train", statistics_table(pool))
                if (folder / "quarantine.jsonl").is_file():
                    log.warning("rejected lines are in %s", folder / "quarantine.jsonl")
                self._reported = True
        for extra in (self.validation_path, self.test_path):
            if extra:
                reader = self._reader([extra], order_column=None)
                folder = self._pool_folder(reader, 0.0)
                self._build(folder, reader)

    def _build(self, folder: Path, reader: Reader, *holdout: Any) -> None:
        """Make a pool unless it is there; processes that want the same one wait for the first."""
        if (folder / "train" / MANIFEST).is_file():
            return
        lock = self.cache_dir / "locks" / folder.name
        with writing_to(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
        with lock.open("rb") as handle:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not (folder / "train" / MANIFEST).is_file():
                build_pool(reader, self.tokeniser, folder, self.on_bad_line, *holdout)

    def setup(self, stage: str | None = None) -> None:
        """Open the pools (on every process)."""
        if stage == "fit":
            self.refuse_prompts()
        tokeniser = self.tokeniser
        self.table: ArrowTable
        if self.cleaned_folder:
            check_tokenizer(self.cleaned_folder, tokeniser.tokenizer)
            vocabulary = 1 + max(tokeniser.tokenizer.get_vocab().values(), default=-1)
            self.table = CleanedPool(self.cleaned_folder, self.cache_dir, vocabulary)
        else:
            folder = self._pool_folder(self._reader(self.paths), self.validation_share)
            self.table = open_pool(folder / "train")
            if self.validation_share:
                self.validation = open_pool(folder / "validation")
        if self.validation_path:
            self.validation = self._extra_pool(self.validation_path)
        if self.validation is not None and not self.validated_rows().counts.any():
            raise ValueError(
                f"data.validation_path: no label of {self.validation_path or self.paths[0]} has a "
                "positive weight, so there is no loss to measure"
            )
        if self.test_path:
            self.test = self._extra_pool(self.test_path)

    @property
    def pool(self) -> TokenPool:
        """The pool to clean.

        Raises:
            ValueError: if ``path`` names a cleaned pool, which has been through that already.
        """
        if not isinstance(self.table, TokenPool):
            raise ValueError(
                f"data.path: {self.paths[0]} is a cleaned pool; give the raw data, or its "
                "data.parquet to start anew from its tokens"
            )
        return self.table

    def _extra_pool(self, path: str) -> TokenPool:
        folder = self._pool_folder(self._reader([path], order_column=None), 0.0)
        return open_pool(folder / "train")

    def _pool_folder(self, reader: Reader, holdout: float) -> Path:
        what = (*reader.paths, str(reader.order_column))
        if what not in self._fingerprints:
            self._fingerprints[what] = data_fingerprint(reader)
        key = f"{self._fingerprints[what]}-{self.tokeniser.fingerprint()}"
        if holdout:
            key += f"-{holdout}-{self.seed}"
        return self.cache_dir / "pools" / f"{key}-{self.on_bad_line}"

    def subset_rows(self) -> list[np.ndarray]:
        """Pool rows of D_0 ... D_{subsets-1}, each ascending; together every row exactly once.

        Part sizes differ by at most one; the remainder goes to the first parts.
        """
        rows = len(self.pool)
        if rows < self.subsets:
            raise ValueError(f"data.subsets: {self.subsets} parts of a pool of {rows} sample(s)")
        if self.order == "shuffle":
            order = np.random.default_rng(self.seed).permutation(rows)
        else:
            order = np.argsort(-self.pool.order(), kind="stable")
        return [np.sort(part) for part in np.array_split(order, self.subsets)]

    def chosen_rows(self) -> np.ndarray | None:
        """Rows of the parts named by ``subset``, ascending; None for all rows."""
        if self.subset is None:
            return None
        parts = self.subset_rows()
        return np.sort(np.concatenate([parts[i] for i in sorted(set(self.subset))]))

    # -- loaders ------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        module = None if self.trainer is None else self.trainer.lightning_module
        return self.training_loader(self.trained_rows(), getattr(module, "carry", ()))

    def val_dataloader(self) -> Any:
        if self.validation is None:
            return []
        return self.scoring_loader(self.validated_rows())

    def predict_dataloader(self) -> DataLoader:
        return self.scoring_loader(self.scored_rows())

    def trained_rows(self) -> TokenRows:
        """What `fit` trains on: labels where the data have their own, else every response token."""
        return TokenRows(self.table, self.chosen_rows(), labels=True)

    def validated_rows(self) -> TokenRows:
        """What the validation loss is of: labels of positive weight where the data have their own,
        else every response token.

        Raises:
            ValueError: if there are no validation data.
        """
        if self.validation is None:
            raise ValueError("data.validation_path: give it or data.validation_share")
        return TokenRows(self.validation, labels=True).learnt()

    def scored_rows(self) -> TokenRows:
        """What ``score`` scores: the targets of the chosen rows of the pool."""
        return TokenRows(self.pool, self.chosen_rows(), self.targets)

    def scoring_loader(self, rows: TokenRows) -> DataLoader:
        """Length-sorted batches of at most ``token_budget`` tokens; this rank's share of them."""
        planned = self.planned(rows)
        rank, world = self._place()
        # Every process gets as many batches as the others, some of them empty: a process without
        # any would be refused or fall out of step.
        plan = [*planned.plan, *([np.zeros(0, dtype=np.int64)] * (-len(planned) % world))]
        return DataLoader(planned.only(plan[rank::world]), batch_size=None)

    def planned(self, rows: TokenRows) -> PlannedBatches:
        """The batches of `scoring_loader`, of all ranks together."""
        rows = rows if self.cut else rows.to_the_end()
        plan = plan_batches(rows.lengths, self.token_budget, self.layout)
        return PlannedBatches(rows, plan, self.layout, self.pad_id)

    def training_loader(self, rows: TokenRows, carry: Sequence[str] = ()) -> DataLoader:
        """Global batches of ``batch_size`` samples in the run's seeded order.

        Args:
            rows: what to train on.
            carry: what its samples must bring along: `CleanedSFTModule.carry`.

        Raises:
            ValueError: if nothing carries loss, or a target lacks what it must bring along.
        """
        self.refuse_prompts()
        if not (rows.counts > rows.negative).any():
            raise ValueError("data.path: no token carries loss, so there is nothing to train on")
        if rows.negative.any() and self.reduction == "published":
            raise ValueError(
                "data.reduction: published does not go with a cleaned pool of negative weights; "
                "use tokens"
            )
        rows = rows.carrying(carry) if carry else rows
        rank, world = self._place()
        steps = _Steps(
            rows=rows if self.cut else rows.to_the_end(),
            batch_size=self.batch_size,
            seed=self.seed,
            budget=self.token_budget,
            layout=self.layout,
            pad_id=self.pad_id,
            reduction=self.reduction,
            rank=rank,
            world=world,
        )
        return _StepLoader(steps)

    def refuse_prompts(self) -> None:
        """Training is on responses; raises ValueError if ``targets`` says otherwise."""
        if self.targets != "response":
            raise ValueError(
                f"data.targets: {self.targets} is for `score` alone; training is on responses"
            )

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            together = here()  # the loop, which makes a Trainer for every step
            return together.rank, together.processes
        return self.trainer.global_rank, self.trainer.world_size


@dataclass
class PlannedBatches(Dataset[Batch]):
    """Item i is batch i of a plan.

    Whole batches are the items because Lightning rebuilds custom batch samplers for `predict`. It
    also serves as a loader, which Lightning does not deal out again, whatever it is told.
    """

    rows: TokenRows
    plan: list[np.ndarray]
    layout: Layout
    pad_id: int

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        return self.collated(self.plan[index])

    def __iter__(self) -> Iterator[Batch]:
        return (self.collated(members) for members in self.plan)

    def collated(self, members: np.ndarray | Sequence[int]) -> Batch:
        """A batch of these rows: indices into ``rows``."""
        samples = [self.rows[int(i)] for i in members]
        return collate(samples, self.layout, self.pad_id)

    def only(self, plan: list[np.ndarray]) -> PlannedBatches:
        """The same rows in other batches."""
        return PlannedBatches(self.rows, plan, self.layout, self.pad_id)


@dataclass
class _Steps(Dataset[GlobalBatch]):
    """Item (epoch, step) is that step's `GlobalBatch` for this process."""

    rows: TokenRows
    batch_size: int
    seed: int
    budget: int
    layout: Layout
    pad_id: int
    reduction: Reduction
    rank: int
    world: int
    _planned: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, key: tuple[int, int]) -> GlobalBatch:
        epoch, step = key
        members = self._epoch(epoch)[step]
        negative = int(self.rows.negative[members].sum())
        factors = self._factors((self.rows.counts - self.rows.negative)[members])
        mine = share_of_rank(self.rows.lengths[members], self.rank, self.world)
        samples = []
        for place in mine:
            sample = self.rows[int(members[place])]
            weights = sample.weights
            sample.weights = weights * np.float32(factors[place])
            if negative:  # those are a mean of their own
                sample.weights[weights < 0.0] = weights[weights < 0.0] / np.float32(negative)
            samples.append(sample)
        lengths = self.rows.lengths[members[mine]]
        plan = plan_batches(lengths, self.budget, self.layout)
        return GlobalBatch(
            micro=[collate([samples[i] for i in b], self.layout, self.pad_id) for b in plan],
            kept=int(self.rows.counts[members].sum()) - negative,
            responses=int(self.rows.responses[members].sum()),
            negative=negative,
            key=key,
        )

    def id_of(self, row: int) -> str:
        """The id of the sample in a row of the pool."""
        return str(self.rows.table.texts("id")[row])

    def tokens_per_step(self) -> int:
        """Tokens that a process computes in one step, on average."""
        share = self.batch_size / self.world
        return int(np.ceil(self.rows.lengths.mean() * min(share, len(self.rows))))

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        if self._planned is None or self._planned[0] != epoch:
            plan = plan_epoch(len(self.rows), self.batch_size, self.seed, epoch)
            self._planned = (epoch, plan)
        return self._planned[1]

    def _factors(self, counts: np.ndarray) -> np.ndarray:
        """What each member's token weights are multiplied by, float64, shape (members,)."""
        if self.reduction == "tokens":
            return np.full(len(counts), 1.0 / max(int(counts.sum()), 1))
        groups = np.arange(len(counts)) // PUBLISHED_ROWS
        kept = np.bincount(groups, weights=counts)
        with_targets = max(int((kept > 0).sum()), 1)
        return 1.0 / (with_targets * np.maximum(kept, 1.0))[groups]


class _StepSampler(Sampler[tuple[int, int]]):
    """(epoch, step) keys; Lightning announces the epoch."""

    def __init__(self, steps: int):
        self.steps, self.epoch, self.first = steps, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, self.first = self.first, 0
        yield from ((self.epoch, step) for step in range(first, self.steps))


class _StepLoader(DataLoader):
    """A loader whose place inside an epoch survives in a checkpoint.

    A plain one starts the epoch over after a mid-epoch resume and reads the wrong samples.
    """

    def __init__(self, steps: _Steps):
        super().__init__(steps, batch_size=None, sampler=_StepSampler(len(steps)))
        self._steps, self._done = steps, 0

    def __iter__(self) -> Any:
        sampler = self.sampler
        assert isinstance(sampler, _StepSampler)
        self._done = sampler.first
        for batch in super().__iter__():
            self._done += 1
            yield batch
        self._done = 0

    def state_dict(self) -> dict[str, int]:
        """Steps done in this epoch, and the token budget, which may have been cut on the way."""
        return {"done": self._done, "budget": self._steps.budget}

    def load_state_dict(self, state: dict[str, int]) -> None:
        sampler = self.sampler
        assert isinstance(sampler, _StepSampler)
        sampler.first = state["done"] % len(sampler)
        self._steps.budget = min(self._steps.budget, state.get("budget", self._steps.budget))
