"""What a score table can say of a token besides its loss.

Attention and gap come from the forward pass that gives the losses; `alone` takes a second pass over
the response tokens; nearness to the words of a domain is one number per vocabulary entry, looked up
per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenclean.data.batches import Batch, Sample, collate, plan_batches
from tokenclean.data.rows import TokenRows
from tokenclean.models import AttentionReader, Network, default_layer
from tokenclean.scoring.table import Column

EXPERTS = Path(__file__).parent / "experts"
#: Tokens per pass where words and vocabulary entries are fed by themselves.
_BUDGET = 1024
#: Rows of the embedding matrix that are widened to float32 at a time.
_EMBEDDINGS = 8192


@dataclass
class AttributeSettings:
    """What some columns of a score table rest on.

    Args:
        experts: words of a domain, for the columns ``relevance`` and ``relevance_hidden``: the name
            of a shipped list (``code``, ``maths``, ``medicine``), a file with one word or short
            phrase per line, or the words themselves.
        layer: the layer that the column ``attention`` reads, from 0; a negative one counts from the
            end. null: three quarters up.
    """

    experts: str | list[str] = field(default_factory=list)
    layer: int | None = None

    def __post_init__(self) -> None:
        _ = self.words  # a name that means nothing is refused now

    @property
    def words(self) -> list[str]:
        """The expert words, each once."""
        if not isinstance(self.experts, str):
            words = self.experts
        else:
            shipped = EXPERTS / f"{self.experts}.txt"
            path = shipped if shipped.is_file() else Path(self.experts)
            if not path.is_file():
                known = ", ".join(sorted(p.stem for p in EXPERTS.glob("*.txt")))
                raise ValueError(
                    f"attributes.experts: {self.experts!r} is no file and none of the shipped "
                    f"lists ({known}); words themselves are given as a list, '[force, mass]'"
                )
            words = path.read_text(encoding="utf-8").splitlines()
        found = list(dict.fromkeys(w.strip() for w in words if w.strip()))
        if self.experts and not found:
            raise ValueError(f"attributes.experts: {self.experts} holds no word")
        return found

    def check(self, column: str) -> None:
        """Refuse a column that these settings do not allow.

        Raises:
            ValueError: if it needs expert words and there are none.
        """
        if column in ("relevance", "relevance_hidden") and not self.words:
            raise ValueError(
                f"attributes.experts: the column {column} needs the words of a domain; give the "
                "name of a shipped list, such as maths, a file, or a list of words "
                "(--attributes.experts of `clean`, --model.attributes.experts of `score`)"
            )

    def stated(self, columns: Sequence[Column], config: Any) -> dict[str, Any]:
        """What a table of these columns says about them in its manifest."""
        stated: dict[str, Any] = {}
        if "attention" in columns:
            layers = config.get_text_config().num_hidden_layers
            stated["layer"] = self.depth(config) % layers
        if {"relevance", "relevance_hidden"} & set(columns):
            stated["experts"] = self.words
        return stated

    def depth(self, config: Any) -> int:
        """The layer that ``attention`` reads in a model of this configuration."""
        return default_layer(config) if self.layer is None else self.layer


class TokenAttributes:
    """The columns of one pass, batch by batch.

    Args:
        columns: which; see `Column`.
        settings: what they rest on.
        network: on its device, as it scores.
        rows: what is scored.
        tokenizer: loads the base's tokenizer, if one is needed.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        settings: AttributeSettings,
        network: Network,
        rows: TokenRows,
        tokenizer: Callable[[], Any],
    ):
        self.columns, self.settings, self.network = columns, settings, network
        self._rows, self._load_tokenizer = rows, tokenizer
        self._readers: dict[Column, AttentionReader] = {}
        if "attention" in columns:
            depth = settings.depth(network.hf.config)
            self._readers["attention"] = AttentionReader(depth, "received")
        if "attention_keys" in columns:
            self._readers["attention_keys"] = AttentionReader(0, "keys")

    @property
    def readers(self) -> list[AttentionReader]:
        """What `Network.hidden` must read on the way for `of`."""
        return list(self._readers.values())

    def of(self, batch: Batch) -> dict[Column, Tensor]:
        """Every column but ``gap`` for the batch that was passed last: float32, shape (N,) each."""
        found = {name: _at_targets(reader, batch) for name, reader in self._readers.items()}
        if "alone" in self.columns:
            found["alone"] = self._alone(batch)
        if "relevance" in self.columns:
            found["relevance"] = self._relevance[batch.targets]
        if "relevance_hidden" in self.columns:
            found["relevance_hidden"] = self._relevance_hidden[batch.targets]
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load_tokenizer()

    def _alone(self, batch: Batch) -> Tensor:
        """Loss of each target after nothing but a start token and the sample's earlier targets."""
        tokenizer = self._tokenizer
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        samples = []
        for place, targets in enumerate(batch.targets.cpu().split(batch.counts)):
            ids = np.append(start, targets.numpy()).astype(np.int32)
            positions = np.arange(1, len(ids))
            samples.append(Sample(place, ids, positions, np.ones(len(positions), np.float32)))
        alone = collate(samples, self.network.layout).to(batch.targets.device)
        with self.network.clock(alone.tokens):
            parts = dict(alone.split(self.network(alone)))
        return torch.cat([parts[place] for place in range(len(samples))])

    @cached_property
    def _words(self) -> list[list[int]]:
        """Token ids of every expert word as it stands in a text and at the start of one.

        Tokens that stand for the space alone are left out.
        """
        tokenizer = self._tokenizer
        found = []
        for text in (form for word in self.settings.words for form in (" " + word, word)):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            found.append([i for i in ids if tokenizer.decode([i]).strip()])
        return [ids for ids in found if ids]

    @cached_property
    def _relevance(self) -> Tensor:
        """1 - d / max d of every vocabulary entry: float32, shape (V,).

        d is the Euclidean distance of its input embedding to the mean over the tokens of the expert
        words (task relevance of arXiv 2602.14536).
        """
        weight = self.network.hf.get_input_embeddings().weight
        words = torch.tensor([i for ids in self._words for i in ids], device=weight.device)
        mean = weight[words].float().mean(0)
        distance = torch.cat(
            [(part.float() - mean).norm(dim=1) for part in weight.split(_EMBEDDINGS)]
        )
        # Embedding matrices may be longer than the vocabulary.
        known = [i for i in self._tokenizer.get_vocab().values() if i < len(distance)]
        return 1.0 - distance / distance[known].max()

    @cached_property
    def _relevance_hidden(self) -> Tensor:
        """Cosine of a token's state, fed by itself, with the mean of the expert words' last states.

        Of the targets' ids alone: float32, shape (V,), NaN elsewhere. States are the last ones, the
        final norm included.
        """
        weight = self.network.hf.get_input_embeddings().weight
        words = [np.array(ids) for ids in self._words]
        sums = [states.sum(0) for _, states in self._last_states(words)]
        mean = torch.stack(sums).sum(0) / len(words)
        ids = self._rows.target_ids()
        cosines = torch.full((len(weight),), torch.nan, device=weight.device)
        for chosen, states in self._last_states(list(ids[:, None])):
            found = torch.nn.functional.cosine_similarity(states, mean[None], dim=-1)
            cosines[torch.from_numpy(ids[chosen]).to(weight.device)] = found
        return cosines

    def _last_states(self, texts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Final state of the last token of each text by itself: some texts, (n, H) in float32."""
        network, lengths = self.network, np.array([len(ids) for ids in texts])
        for members in plan_batches(lengths, _BUDGET, network.layout):
            samples = [
                # the token to predict is never looked at
                Sample(i, np.append(texts[i], 0), lengths[i : i + 1], np.ones(1, np.float32))
                for i in members
            ]
            batch = collate(samples, network.layout).to(network.device)
            with network.clock(batch.tokens):
                states = network.hidden(batch).float()
            yield np.array(batch.rows), states


def _at_targets(reader: AttentionReader, batch: Batch) -> Tensor:
    """A reader's values at the targets' own tokens; NaN where that token was not computed."""
    assert reader.values is not None
    own = batch.predicting + 1
    ends = batch.bounds[1:].long()
    counts = torch.tensor(batch.counts, device=ends.device)
    inside = own < ends.repeat_interleave(counts, output_size=len(own))
    return reader.values[own.clamp_max(len(reader.values) - 1)].masked_fill(~inside, torch.nan)
