"""What an online weighting is: the base class of every file in `tokenclean.training.weighting`.

A weighting gives the trained tokens of a batch weights that follow from the model's own losses on
them, at every step anew:

    loss = sum_t v_t w_t nll_t / N        (``mean_over: tokens``, as Eq. (1) of arXiv 2502.01968)
    loss = sum_t v_t w_t nll_t / sum_t v_t w_t                       (``mean_over: weights``)

over the global batch, with w_t the online weight, v_t the weight that the token has in the cleaned
pool (1 by default) and N the number of trained tokens. Tokens that an offline mask dropped are not
there: a weighting sees, ranks and counts what is left. No gradient flows through w_t.

Legend for shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenclean.data.rows import PROMPT
from tokenclean.named import Value, make

PACKAGE = "tokenclean.training.weighting"
#: What a weighting can need.
CACHED = ("base.nll", "reference.nll")
TOP_ENTROPY, TOP_MASS, PROMPT_ATTENTION = "top_entropy", "top_mass", "prompt_attention"

MeanOver = Literal["tokens", "weights"]
Scope = Literal["token", "sample", "batch"]


@dataclass
class Tokens:
    """Trained tokens, whole samples in pool order, and what is known of them; no gradients.

    ``tokens["reference.nll"]`` is a column that the weighting needs.

    Attributes:
        rows: pool row of each token's sample, int64, (N,).
        nll: loss of the model in training, nats, float64, (N,).
        columns: name -> float64, (N,) each: what `Weighting.needs` names, ``top_entropy`` (nats)
            and ``top_mass`` where `Weighting.top` asks for them, ``prompt_attention`` where
            `Weighting.reads_prompt` does.
        rounding: nats; what losses of the same model may differ by between scoring and training.
    """

    rows: Tensor
    nll: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rounding: float = 1e-3

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def probability(self) -> Tensor:
        """Of the token in the data: exp(-nll), float64, (N,)."""
        return (-self.nll).exp()

    def samples(self) -> Iterator[slice]:
        """Where the tokens of each sample are."""
        start = 0
        for count in self.rows.unique_consecutive(return_counts=True)[1].tolist():
            yield slice(start, start := start + count)

    def packed(self) -> Tensor:
        """Everything as one float64 tensor, (N, 2 + columns), to be sent to other processes."""
        return torch.stack([self.rows.double(), self.nll, *self.columns.values()], dim=1)

    @staticmethod
    def unpacked(packed: Tensor, columns: Sequence[str]) -> Tokens:
        """Tokens out of what `packed` gave, end to end; ``columns`` in the order they had."""
        rows, nll, *values = packed.unbind(1)
        return Tokens(rows.long(), nll, dict(zip(columns, values, strict=True)))

    def take(self, order: Tensor) -> Tokens:
        """The tokens of these indices."""
        columns = {name: values[order] for name, values in self.columns.items()}
        return Tokens(self.rows[order], self.nll[order], columns)


@dataclass(frozen=True)
class Weighting:
    """How tokens are weighted. Subclasses are frozen dataclasses: fields are options.

    Class attributes:
        scope: what one token's weight depends on: the ``token`` alone, its ``sample``, or all
            tokens of the global ``batch``.
        needs: columns of the cleaned pool: ``base.nll``, ``reference.nll``.
        top: entropy and mass of this many most likely tokens are wanted.
        reads_prompt: the token's attention to its prompt is wanted.

    Args:
        mean_over: what the sum of weighted losses is divided by: the number of ``tokens``, or the
            sum of their ``weights``; see the module's text.
    """

    scope: ClassVar[Scope] = "token"
    needs: ClassVar[tuple[str, ...]] = ()
    top: ClassVar[int] = 0
    reads_prompt: ClassVar[bool] = False

    mean_over: MeanOver = "tokens"

    def weights(self, tokens: Tokens) -> Tensor:
        """Weight of each token, not negative: float64, (N,).

        Args:
            tokens: at least one; all those of ``scope``, in pool order.
        """
        raise NotImplementedError

    def attention_layer(self, config: Any) -> int:
        """Layer whose attention to the prompt is read, if any is; ``config`` is the model's."""
        raise NotImplementedError

    @property
    def stored(self) -> dict[str, str]:
        """What it needs -> the cleaned pool's column of it: ``base.nll`` -> ``base_nll``."""
        return {need: need.replace(".", "_") for need in self.needs}

    @property
    def carry(self) -> tuple[str, ...]:
        """What `TokenRows.carrying` must be asked for."""
        return (*self.stored.values(), *([PROMPT] if self.reads_prompt else []))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of `Tokens.columns`, in their order."""
        top = (TOP_ENTROPY, TOP_MASS) if self.top else ()
        return (*self.needs, *top, *([PROMPT_ATTENTION] if self.reads_prompt else []))

    @torch.no_grad()
    def weigh(self, tokens: Tokens) -> Tensor:
        """`weights` of tokens in any order of samples: float64, (N,)."""
        order = tokens.rows.argsort(stable=True)
        result = torch.empty_like(tokens.nll)
        result[order] = self.weights(tokens.take(order)).to(result.dtype)
        return result


def make_weighting(name: str, options: Mapping[str, Value] | None = None) -> Weighting:
    """The weighting of a file in `tokenclean.training.weighting`, or of any module by dotted name.

    Raises:
        ValueError: for an unknown weighting or option, listing what there is.
    """
    made = make(Weighting, PACKAGE, name, options, "model.weighting")
    if unknown := sorted(set(made.needs) - set(CACHED)):
        raise ValueError(
            f"model.weighting: {name} needs {', '.join(unknown)}; a cleaned pool keeps only "
            f"{' and '.join(CACHED)}"
        )
    return made


def top_share(values: Tensor, keep: float) -> Tensor:
    """1 for the int(N * keep) largest values, earlier ones first among equals, else 0; float64."""
    chosen = values.argsort(descending=True, stable=True)[: int(len(values) * keep)]
    return torch.zeros_like(values).index_fill_(0, chosen, 1.0)


def check_share(keep: float) -> None:
    """Refuse a keep share outside (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"model.weighting_options: keep = {keep} is not in (0, 1]")


def check_positive(**options: float) -> None:
    """Refuse options that are not positive."""
    for name, value in options.items():
        if not value > 0.0:
            raise ValueError(f"model.weighting_options: {name} = {value} is not positive")
