"""Which tokens TRL's SFTTrainer really trains on, read off the gradient of its loss.

Run inside an environment of its own by `scripts/check_trl.py`, and in-process by the tests; needs
TRL and what TRL needs, nothing of tokenclean. Labels that a collator makes are no proof: the loss
may be another function of them in every version. The final hidden state of a token goes into the
loss only through the logits for the next token, so its gradient is zero exactly where the next
token carries no loss, and elsewhere it is proportional to W'p - w_y (W: output embeddings, p:
probabilities), which tells the target y and its weight.

    python scripts/trl_probe.py --rows ROWS.json --data EXPORT/train.jsonl --out FOUND.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)

#: Label of a token without loss.
NO_LOSS = -100
#: Stands for the length of the longest row in options of a setting.
LONGEST = "longest row"
#: The columns of an export.
BOTH = ("labels", "assistant_masks")
#: How much weaker than the best candidate's a cosine must be for a target to be sure.
SURE = 0.999


@dataclass(frozen=True)
class Setting:
    """One way to train on an export.

    Attributes:
        name: in the table.
        options: of `SFTConfig`.
        columns: besides ``input_ids``; ``completion_mask`` is a copy of ``assistant_masks``.
        recommended: must train on exactly our tokens.
        batch_size: rows per device.
    """

    name: str
    options: dict[str, Any]
    columns: tuple[str, ...] = BOTH
    recommended: bool = False
    batch_size: int = 2


_BFD = {"packing": True, "packing_strategy": "bfd", "max_length": LONGEST}
_OFF = {"packing": False, "max_length": LONGEST}
SETTINGS = (
    Setting("no packing", _OFF, recommended=True),
    Setting(
        "no packing, padding-free", {"padding_free": True, "max_length": None}, recommended=True
    ),
    Setting("packing: bfd", _BFD, recommended=True),
    Setting("packing: bfd_split", {**_BFD, "packing_strategy": "bfd_split"}),
    Setting("packing: wrapped", {**_BFD, "packing_strategy": "wrapped"}),
    Setting("nothing prepared", {**_OFF, "dataset_kwargs": {"skip_prepare_dataset": True}}),
    Setting("no packing, one row a batch", _OFF, batch_size=1),
    Setting("no packing, max_length left out", {}),
    Setting("packing: bfd, max_length left out", {"packing": True}),
    Setting("assistant_only_loss", {**_OFF, "assistant_only_loss": True}),
    Setting("labels alone, no packing", _OFF, ("labels",)),
    Setting("labels alone, packing: bfd", _BFD, ("labels",)),
    Setting("assistant_masks alone, no packing", _OFF, ("assistant_masks",)),
    Setting("assistant_masks alone, packing: bfd", _BFD, ("assistant_masks",)),
    Setting("completion_mask alone, no packing", _OFF, ("completion_mask",)),
    Setting("completion_mask alone, packing: bfd", _BFD, ("completion_mask",)),
    Setting(
        "completion_mask, completion_only_loss, packing: bfd",
        {**_BFD, "completion_only_loss": True},
        ("completion_mask",),
    ),
)


@dataclass
class Row:
    """A sample as we cleaned it: its tokens, and labels that are -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Found:
    """What a setting trained on, against what it should.

    Attributes:
        setting, data: what was tried.
        recommended: as the setting says.
        ours: tokens that should be targets. The first token of a row has none before it to be
            predicted from, so it never is.
        trained: targets seen in the loss.
        missing, extra: tokens that should be targets and are not, and the other way round; the
            latter also counts targets that are no next token of their row, and repeated ones.
        uneven: largest relative difference between the weights of two targets of one batch.
        context: largest difference between a target's loss here and in its row alone, in nats.
        error: why it did not run.
    """

    setting: str
    data: str
    recommended: bool
    ours: int
    trained: int = 0
    missing: int = 0
    extra: int = 0
    uneven: float = 0.0
    context: float = 0.0
    error: str = ""

    @property
    def equal(self) -> bool:
        """Whether exactly our tokens carry loss, all the same."""
        return not self.error and not self.missing and not self.extra and self.uneven < 1e-3


@dataclass
class _Seen:
    """Targets in the loss: (row, place) -> how often; weights and losses of all of them."""

    targets: Counter[tuple[int, int]] = field(default_factory=Counter)
    foreign: int = 0
    uneven: float = 0.0
    losses: list[tuple[tuple[int, int], float]] = field(default_factory=list)


def probe(
    data: Path, rows: Sequence[Row], work: Path, settings: Sequence[Setting] = SETTINGS
) -> list[Found]:
    """Train on an export with a learning rate of 0 and compare what the loss held with our mask.

    Args:
        data: JSONL or Parquet with ``input_ids``, ``labels`` and ``assistant_masks``.
        rows: all rows as they were cleaned. To tell which token of which row a place of a packed
            batch is, every token id occurs once in all rows; those that repeat (an EOS) follow
            one that does not.
        work: folder for caches and what the trainer writes.
        settings: to try.

    Returns:
        One finding per setting; errors of TRL are findings too.

    Raises:
        ValueError: if the rows cannot be told apart.
    """
    kind = {".jsonl": "json", ".parquet": "parquet"}[data.suffix]
    # in memory: what is mapped would be cached under the name of the file
    whole = load_dataset(
        kind, data_files=str(data), split="train", cache_dir=str(work / "cache"),
        keep_in_memory=True,
    )  # fmt: skip
    assert isinstance(whole, Dataset)
    vocabulary = 1 + max(max(row.input_ids) for row in rows)
    model = _model(vocabulary + 1)
    ours = {
        (number, place)
        for number, row in enumerate(rows)
        for place, label in enumerate(row.labels)
        if place and label != NO_LOSS
    }
    alone, places = _alone(model, rows), _places(rows)
    found = []
    for setting in settings:
        name = f"{data.parent.name}/{data.name}"
        one = Found(setting.name, name, setting.recommended, len(ours))
        found.append(one)
        try:
            seen = _train(model, _columns(whole, setting), setting, rows, places, work)
        except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
            one.error = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        one.trained = seen.targets.total() + seen.foreign
        one.missing = len(ours - seen.targets.keys())
        one.extra = one.trained - len(ours & seen.targets.keys())
        one.uneven = seen.uneven
        one.context = max((abs(loss - alone[at]) for at, loss in seen.losses), default=0.0)
    return found


def _columns(whole: Dataset, setting: Setting) -> Dataset:
    if "completion_mask" in setting.columns:
        whole = whole.rename_column("assistant_masks", "completion_mask")
    return whole.select_columns(["input_ids", *setting.columns])


def _model(vocabulary: int) -> LlamaForCausalLM:
    """Random weights; its last token is the padding."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            initializer_range=0.2,  # predictions that differ from place to place
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=vocabulary - 1,
        )
    )


def _alone(model: LlamaForCausalLM, rows: Sequence[Row]) -> dict[tuple[int, int], float]:
    """Loss of every token after the first of its row, in nats, each row by itself."""
    losses = {}
    with torch.no_grad():
        for number, row in enumerate(rows):
            ids = torch.tensor([row.input_ids])
            predicted = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            nll = -predicted.gather(1, ids[0, 1:, None])[:, 0]
            losses.update({(number, i + 1): float(loss) for i, loss in enumerate(nll)})
    return losses


def _train(
    model: LlamaForCausalLM,
    data: Dataset,
    setting: Setting,
    rows: Sequence[Row],
    places: dict[int, tuple[int, int]],
    work: Path,
) -> _Seen:
    """One epoch of SFTTrainer at a learning rate of 0."""
    from trl import SFTConfig, SFTTrainer

    longest = max(len(row.input_ids) for row in rows)
    options: dict[str, Any] = {
        k: longest if v == LONGEST else v for k, v in setting.options.items()
    }
    set_seed(0)
    config = SFTConfig(
        output_dir=str(work / "trainer"),
        per_device_train_batch_size=setting.batch_size,
        num_train_epochs=1,
        learning_rate=0.0,
        optim="sgd",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    vocabulary = model.config.vocab_size
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    pad = f"t{vocabulary - 1}"
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token=pad, pad_token=pad
        ),
    )
    trainer.remove_callback(PrinterCallback)
    reader = _Reader(model, places)
    try:
        trainer.train()
    finally:
        reader.stop()
    return reader.seen


class _Reader:
    """Watches the final hidden states of a model and their gradients."""

    def __init__(self, model: LlamaForCausalLM, places: dict[int, tuple[int, int]]):
        self.seen = _Seen()
        self._model, self._ids = model, torch.empty(0)
        self._place = places
        self._hooks = [
            model.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.model.register_forward_hook(self._end),
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = (args[0] if args else kwargs["input_ids"]).clone()

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden: torch.Tensor = output[0]  # (B, T, H)
        if hidden.requires_grad:
            hidden.register_hook(self._gradient(self._ids, hidden.detach()))

    def _gradient(self, ids: torch.Tensor, hidden: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def read(gradient: torch.Tensor) -> None:
            if not gradient.isfinite().all():
                raise ArithmeticError("the gradient is not finite (a batch without any target)")
            weights: list[float] = []
            for row in range(len(ids)):
                weights += self._read(ids[row], hidden[row].double(), gradient[row].double())
            if weights:
                self.seen.uneven = max(self.seen.uneven, max(weights) / min(weights) - 1)

        return read

    def _read(self, ids: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> list[float]:
        """Targets of one row of a batch, (T,), from its states and their gradient, (T, H).

        Returns:
            Weights of the targets in the loss.
        """
        carrying = gradient.abs().amax(1).nonzero()[:, 0]
        if not len(carrying):
            return []
        output = self._model.lm_head.weight.detach().double()  # (V, H)
        predicted = (hidden[carrying] @ output.T).log_softmax(1)
        mean, g = predicted.exp() @ output, gradient[carrying]
        # cosines of g with mean - w_y for every y, and the lengths of the latter
        lengths = (
            (mean.square().sum(1, keepdim=True) - 2 * mean @ output.T + output.square().sum(1))
            .clamp(min=1e-30)
            .sqrt()
        )
        along = (mean * g).sum(1, keepdim=True) - g @ output.T
        cosines = along / lengths / g.norm(dim=1, keepdim=True)
        best, target = cosines.max(1)
        weights = g.norm(dim=1) / lengths.gather(1, target[:, None])[:, 0]
        places = self._walk(ids.tolist())
        for i, at in enumerate(carrying.tolist()):
            if best[i] < SURE:
                raise ArithmeticError(f"no target explains the gradient (cosine {best[i]:.4f})")
            here = places[at]
            after = places[at + 1] if at + 1 < len(places) else None
            follows = here is not None and after == (here[0], here[1] + 1)
            if follows and after is not None and int(target[i]) == int(ids[at + 1]):
                self.seen.targets[after] += 1
                self.seen.losses.append((after, -float(predicted[i, target[i]])))
            else:
                self.seen.foreign += 1
        return [float(w) for w in weights]

    def _walk(self, ids: list[int]) -> list[tuple[int, int] | None]:
        """Row and place of every token of a row of a batch; None for padding."""
        places: list[tuple[int, int] | None] = []
        for token in ids:
            before = places[-1] if places else None
            next_one = None if before is None else (before[0], before[1] + 1)
            places.append(self._place.get(token, next_one))
        return places


def _places(rows: Sequence[Row]) -> dict[int, tuple[int, int]]:
    """Row and place of the token ids that occur once.

    Raises:
        ValueError: if a row begins with one that repeats.
    """
    often = Counter(token for row in rows for token in row.input_ids)
    for number, row in enumerate(rows):
        if often[row.input_ids[0]] > 1:
            raise ValueError(f"row {number} begins with a token that occurs elsewhere")
    return {
        token: (number, place)
        for number, row in enumerate(rows)
        for place, token in enumerate(row.input_ids)
        if often[token] == 1
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="our rows: input_ids, labels")
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="JSONL and Parquet")
    parser.add_argument("--out", type=Path, required=True, help="JSON of what was found")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [Row(**row) for row in json.loads(options.rows.read_text(encoding="utf-8"))]
    found = [
        asdict(one) | {"equal": one.equal}
        for data in options.data
        for one in probe(data, rows, options.out.parent)
    ]
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
