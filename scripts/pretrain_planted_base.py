"""Pretrain the small base that is shipped for the planted-noise pool.

The tokenizer is trained on the generator's corpus and on pool-style text, so every family's words
are short; the model is trained on the corpus alone. The checkpoint is stored as float16, and the
accuracy reported (and written to ``base_card.json``) is that of the stored weights in float32.

    python scripts/pretrain_planted_base.py --out tokenclean/data/planted_base

Training takes minutes on one core; one thread keeps it reproducible.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenclean.data.planted import (
    EOS,
    REGIMES,
    PlantedSettings,
    Row,
    corpus,
    evaluation_rows,
    pool_rows,
    render,
)

BOS, PAD = "<s>", "<pad>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose offsets tile the text and that adds BOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text.replace(EOS, "") for text in texts), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """Join the documents into rows of `length` tokens; what does not fill a row is left out."""
    ids = [token for encoded in tokenizer(documents)["input_ids"] for token in encoded]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def train(model: LlamaForCausalLM, data: Tensor, batch: int, rate: float) -> None:
    """Go over the packed rows once, in order, with a cosine schedule after a short warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = len(data) // batch
    warm_up = max(1, steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01
        ),
    )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        rows = data[step * batch : (step + 1) * batch]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}  {seconds:5.0f} s", flush=True)


@torch.no_grad()
def family_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> dict[str, float]:
    """Return the share of test questions whose every value token is the model's first choice.

    Prompt and preceding text are the gold ones. A token belongs to the value if it covers any of
    the value's characters.
    """
    model.eval()
    hits: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        text = render(row["messages"])
        answer = row["messages"][-1]["content"]
        start = text.rindex(answer)
        (_, _, head, _), (_, tail, _, _) = row["truth"]
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        best = model(input_ids=ids).logits[0].argmax(-1)
        value = [
            index
            for index, (first, last) in enumerate(encoded["offset_mapping"])
            if first < start + tail and last > start + head
        ]
        hits[row["source"]].append(all(best[i - 1] == ids[0, i] for i in value))
    return {name: sum(found) / len(found) for name, found in hits.items()}


def in_regime(name: str, accuracy: float) -> bool:
    """Say whether an accuracy lies where the table of regimes puts the family."""
    low, high = {"known": (0.8, 1.0), "weak": (0.2, 0.8), "blank": (0.0, 0.2)}[REGIMES[name]]
    return low <= accuracy <= high


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Pretrain the base of the planted-noise pool.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_out = Path(__file__).resolve().parents[1] / "tokenclean" / "data" / "planted_base"
    parser.add_argument("--out", type=Path, default=default_out, help="folder of the checkpoint")
    parser.add_argument("--documents", type=int, default=70_000, help="size of the corpus")
    parser.add_argument("--vocabulary", type=int, default=1_280, help="number of tokens")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model")
    parser.add_argument("--mlp", type=int, default=240, help="width of the feed-forward layers")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--length", type=int, default=128, help="tokens per packed row")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and corpus")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    documents = list(corpus(options.documents, options.seed))
    # The pool that trains the tokenizer is not one that is likely to be cleaned later.
    pool = pool_rows(PlantedSettings(samples=10_000, seed=options.seed + 1_000_003))
    texts = documents[:10_000] + [render(row["messages"]) for row in pool]
    tokenizer = train_tokenizer(texts, options.vocabulary)
    data = pack(documents, tokenizer, options.length)
    print(f"{len(documents)} documents, {data.numel()} tokens, {len(tokenizer)} in the vocabulary")

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters")
    train(model, data, options.batch, options.rate)

    options.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(options.out)
    model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    accuracy = family_accuracy(model, tokenizer, evaluation_rows(PlantedSettings()))
    for name, share in accuracy.items():
        note = "" if in_regime(name, share) else "  <- outside its regime"
        print(f"{name:10s} {REGIMES[name]:6s} {share:.3f}{note}")
    card: dict[str, Any] = {
        "command": " ".join(["python", "scripts/pretrain_planted_base.py", *sys.argv[1:]]),
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "corpus": {"documents": len(documents), "tokens": data.numel()},
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "accuracy": {k: round(v, 4) for k, v in accuracy.items()},
        "regime": {name: REGIMES[name] for name in accuracy},
        "seconds": round(time.perf_counter() - start),
    }
    card_text = json.dumps(card, indent=2) + "\n"
    (options.out / "base_card.json").write_text(card_text, encoding="utf-8")
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{size / 1e6:.2f} MB in {options.out}, {card['seconds']} s")
    if not all(in_regime(name, share) for name, share in accuracy.items()):
        sys.exit("the base does not fit the table of regimes")


if __name__ == "__main__":
    main()
