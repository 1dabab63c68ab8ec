"""How each format is loaded: the code and settings that its card shows, run by the tests."""

from __future__ import annotations

import json

import numpy as np

from tokenclean.export.card import Loading
from tokenclean.export.formats import Files


def trl(longest: int, base: str) -> Loading:
    """Rows of up to ``longest`` tokens; ``base`` as `tokenclean.export.card.named` gives it."""
    text = f"""\
```python
from datasets import load_dataset

rows = load_dataset("json", data_files="train.jsonl", split="train")  # or "parquet"
```

```python
from trl import SFTConfig, SFTTrainer

# The longest row has {longest} tokens; TRL's own default would cut rows of more than 1024.
settings = SFTConfig(output_dir="../trained", max_length={longest}, packing=False)
base = {base}
trainer = SFTTrainer(model=base, args=settings, train_dataset=rows)
trainer.train()
```

Three settings train on exactly these tokens:

* `packing=False, max_length={longest}`, as above;
* `packing=True, packing_strategy="bfd", max_length={longest}`;
* `padding_free=True, max_length=None`.

Not so `packing_strategy="wrapped"`, which lets rows run into one another and cuts them, nor any of
the first two without `max_length`: TRL then cuts rows of more than 1024 tokens. Keep all three
columns, and leave `assistant_only_loss` and `dataset_kwargs` alone: versions of TRL differ in
whether they go by `labels` or by `assistant_masks`, which say the same. TRL shifts the labels
itself."""
    return Loading("TRL", text, "train.parquet")


def axolotl(longest: int) -> Loading:
    text = f"""\
```yaml
datasets:
  - path: train.jsonl   # with the path of this folder in front
    ds_type: json
    # no `type:`, which would have Axolotl tokenise again
sequence_len: {longest}   # or more: longer rows are dropped
sample_packing: true
```

```python
import json

rows = [json.loads(line) for line in open("train.jsonl", encoding="utf-8")]
```"""
    return Loading("Axolotl", text, "train.jsonl")


def llamafactory(longest: int) -> Loading:
    text = f"""\
```yaml
stage: sft
tokenized_path: .   # the path of this folder; it takes the place of `dataset`
cutoff_len: {longest}
```

The rows are not packed. LLaMA-Factory reads the folder as `datasets` does:

```python
from datasets import load_from_disk

rows = load_from_disk(".")["train"]
```"""
    return Loading("LLaMA-Factory", text)


def olmo(longest: int, dtype: str, eos_id: int, files: Files) -> Loading:
    first = files.data[0]
    text = f"""\
`token_ids_part_*.npy` are arrays of little-endian {dtype} without a header,
`labels_mask_part_*.npy` of bool (true at a token to be learnt, not shifted), and
`token_ids_part_*.csv.gz` says of every document in the part where it starts and, exclusive, ends.

```python
import csv
import gzip

import numpy as np

tokens = np.memmap("{first}", mode="r", dtype="{np.dtype(dtype).newbyteorder("<").str}")
mask = np.memmap("{first.replace("token_ids", "labels_mask")}", mode="r", dtype=np.bool_)
with gzip.open("{first.replace(".npy", ".csv.gz")}", "rt") as file:
    bounds = [(int(start), int(end)) for start, end in csv.reader(file)]
```

In OLMo-core: `NumpyPackedFSLDatasetConfig(paths=["token_ids_part_*.npy"], expand_glob=True,
label_mask_paths=["labels_mask_part_*.npy"], dtype=NumpyDatasetDType.{dtype}, sequence_length=...,
tokenizer=...)` with a sequence length of {longest} or more and a `TokenizerConfig` whose
`eos_token_id` is {eos_id}."""
    return Loading("OLMo-core", text)


def jsonl() -> Loading:
    text = """\
```python
import json

rows = [json.loads(line) for line in open("samples.jsonl", encoding="utf-8")]
```

Lists are aligned with `input_ids`. `labels` is the token's id where it carries loss, else -100, not
shifted; `weight` multiplies that loss (elsewhere it means nothing), and where it is negative the
token is to be unlearnt. Losses are in nats, null where there is none; `score` is `base_nll` minus
`reference_nll`. `reason` says what became of a token, `response_mask` whether it is a response's.
`round` 0 is the warm-up, which is not cleaned."""
    return Loading("anything that reads JSON", text, "samples.jsonl")


def spans(add_special_tokens: bool, tokenizer: str) -> Loading:
    """How texts were tokenised; ``tokenizer`` as `tokenclean.export.card.named` gives it."""
    text = f"""\
```python
import json

rows = [json.loads(line) for line in open("samples.jsonl", encoding="utf-8")]
row = rows[0]
kept = [row["text"][span["start"] : span["end"]] for span in row["spans"] if span["kept"]]
```

Labels under any fast tokenizer: a token is learnt if one of its characters is.

```python
from transformers import AutoTokenizer

base = {tokenizer}
tokenizer = AutoTokenizer.from_pretrained(base)
encoded = tokenizer(
    row["text"], return_offsets_mapping=True, add_special_tokens={add_special_tokens}
)
labels = [
    token
    if any(s["kept"] and start < s["end"] and s["start"] < end for s in row["spans"])
    else -100
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
]
```

Ranges count characters (code points) of `text`, ends exclusive; `turn_start` and `turn_end` count
from the start of the response, whose number is `turn`. `responses` are the ranges of the responses,
their EOS included, and `spans` tile them. `score` is the mean over the span's tokens, `weight`, if
there is one, that of each. A character belongs to the token that completes it; a token that ends
within one goes with that token."""
    return Loading("other tokenizers", text, "samples.jsonl")


def adapter(
    dtype: str, base: str, revision: str | None, tokenizer: str | None, remote: bool
) -> Loading:
    """How to load an adapter onto its base.

    Args:
        dtype: of the base's weights.
        base: as `tokenclean.export.card.named` gives it.
        revision: of the base, if the run names one.
        tokenizer: what to load it from, if that is not the base.
        remote: the base brings Python code of its own.
    """
    trusted = ", trust_remote_code=True" if remote else ""
    at = f", revision={json.dumps(revision)}" if revision else ""
    spoken = f"{json.dumps(tokenizer)}{trusted}" if tokenizer else f"base{at}{trusted}"
    asked = {"revision": revision, "tokenizer": tokenizer, "trust_remote_code": remote or None}
    more = "".join(f",{key}={value}" for key, value in asked.items() if value)
    text = f"""\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
base = {base}
model = AutoModelForCausalLM.from_pretrained(base{at}{trusted}, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, folder)
tokenizer = AutoTokenizer.from_pretrained({spoken})
```

With lm-evaluation-harness:
`lm_eval --model hf --model_args pretrained=BASE,peft=FOLDER{more} --tasks ...`."""
    return Loading("PEFT", text)


def merged(dtype: str, remote: bool) -> Loading:
    """``dtype`` is that of the weights; ``remote``: the model brings Python code of its own."""
    trusted = ", trust_remote_code=True" if remote else ""
    text = f"""\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype}{trusted})
tokenizer = AutoTokenizer.from_pretrained(folder{trusted})
```

With lm-evaluation-harness:
`lm_eval --model hf --model_args pretrained=FOLDER{",trust_remote_code=True" if remote else ""} \
--tasks ...`."""
    return Loading("transformers", text)
