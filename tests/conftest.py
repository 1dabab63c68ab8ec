"""Fixtures: tokenizers and models small enough to check by eye, made on the spot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Two threads make models of this size many times slower.
torch.set_num_threads(1)

TEXTS = [
    "<|user|>\nWhat is the colour of the sky?\n<|assistant|>\nThe sky is blue.",
    "<|system|>\nBe brief.\n<|user|>\nAdd 2 and 3.\n<|assistant|>\nThe sum is 5.",
    "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9",
]


def byte_level_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the GPT-2 and Llama 3 manner, with or without a BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over U+2581 words with byte fallback and no pad token, in the Llama 2 manner."""
    alphabet = sorted(set("".join(TEXTS)) | set("▁"))
    alphabet = [c for c in alphabet if c not in "\n "]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in alphabet:
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "t"), ("▁", "s"), ("h", "e"), ("▁t", "he"), ("s", "k"), ("sk", "y")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: ids can be read off the text. `$` is the EOS, no BOS."""
    characters = [chr(c) for c in range(32, 127) if chr(c) != "$"] + ["\n"]
    vocabulary = {"$": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate(characters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="$", unk_token="<unk>", pad_token="$"
    )


def tiny_llama(vocab_size: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A two-layer Llama with random weights; grouped queries, untied head."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # losses that differ from token to token
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its byte-level tokenizer, saved as a hub model would be."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON value per line; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def conversation(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    """A single-turn row in Tulu's shape."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **columns,
    }


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    """Forty short conversations of two sources, of unequal length."""
    rows = [
        conversation(
            f"What is {i} plus {i % 7}?",
            "The sum is " + " ".join([str(i + i % 7)] * (1 + i % 5)) + ".",
            id=f"row-{i}",
            source="even" if i % 2 == 0 else "odd",
            rating=i % 10,
        )
        for i in range(40)
    ]
    return write_jsonl(tmp_path / "pool.jsonl", rows)


def llama_nll_float64(
    model: Any, ids: Sequence[int], deltas: Any = None, found: Any = None
) -> torch.Tensor:
    """Loss of every token after the first, written out in float64 for one Llama-like sample.

    Reads the weights of a transformers Llama or Mistral (no bias, full attention, default rotary
    embedding) and nothing of its code. ``deltas`` maps a module's name, e.g.
    ``model.layers.0.mlp.up_proj``, to what is added to its weight. A dict ``found`` receives
    ``attention``, (layers, heads, T, T), and ``hidden``, the final states, (T, H).
    """
    attentions = []
    config = model.config
    weights = {k: v.detach().double() for k, v in model.state_dict().items()}
    for name, delta in (deltas or {}).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta.double()
    length, heads, kv_heads = len(ids), config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.arange(length).double()[:, None] * frequencies  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = weights["model.embed_tokens.weight"][torch.as_tensor(ids)]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            (h @ weights[f"{at}.self_attn.{n}_proj.weight"].T).view(length, count, size)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q.transpose(0, 1)), rotate(k.transpose(0, 1))
        k = k.repeat_interleave(heads // kv_heads, 0)
        v = v.transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
        attention = (q @ k.transpose(1, 2) / size**0.5).masked_fill(future, -torch.inf).softmax(-1)
        attentions.append(attention)
        mixed = (attention @ v).transpose(0, 1).reshape(length, -1)
        x = x + mixed @ weights[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ weights[f"{at}.mlp.gate_proj.weight"].T)
        up = h @ weights[f"{at}.mlp.up_proj.weight"].T
        x = x + (gate * up) @ weights[f"{at}.mlp.down_proj.weight"].T
    final = norm(x, "model.norm.weight")
    if found is not None:
        found.update(attention=torch.stack(attentions), hidden=final)
    logits = final @ weights["lm_head.weight"].T
    chosen = torch.as_tensor(ids)[1:, None]
    return logits[:-1].logsumexp(-1) - logits[:-1].gather(1, chosen)[:, 0]


#: Where Debian, Ubuntu, and Chrome's own packages put a browser; CHROMIUM names another.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless browser of the system; tests that need one are skipped where there is none."""
    found = (os.environ.get("CHROMIUM"), *map(shutil.which, BROWSERS))
    program = next((p for p in found if p), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, CHROMIUM is not set")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container's root cannot have the sandbox; only our own pages are opened.
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


class BrowserPage:
    """A page without a network, and everything that went wrong in it.

    Attributes:
        page: of playwright.
        errors: messages of the console that are errors or warnings, uncaught exceptions, and
            requests that left the disk.
    """

    def __init__(self, page: Any):
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda m: self._note(m.type in ("error", "warning"), m.text))
        page.on("pageerror", lambda error: self._note(True, str(error)))
        page.on("dialog", self._refuse)
        page.on(
            "request",
            lambda r: self._note(not r.url.startswith(("file:", "data:", "blob:")), r.url),
        )

    def _note(self, wrong: bool, text: str) -> None:
        if wrong:
            self.errors.append(text)

    def _refuse(self, dialog: Any) -> None:
        self._note(True, "a dialog")
        dialog.dismiss()

    def open(self, path: Path) -> Any:
        """Open a file; returns the page of playwright."""
        self.page.goto(path.resolve().as_uri())
        return self.page


@pytest.fixture
def browser_page(browser: Any) -> Iterator[BrowserPage]:
    """A fresh page, 1280 x 900."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    yield BrowserPage(context.new_page())
    context.close()


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _skipped.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Where everything is installed, a check that does not run is a failure.
    if os.environ.get("CI") and _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    fatal = " (each one is a failure where CI is set)" if os.environ.get("CI") and _skipped else ""
    terminalreporter.write_line(f"skipped: {len(_skipped)}{fatal}")
    for line in _skipped:
        terminalreporter.write_line(f"  {line}")
