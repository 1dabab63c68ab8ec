"""Every shipped configuration is parsed and run, with whatever it leaves open filled in."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_level_tokenizer, conversation, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tokenclean import cli
from tokenclean.data.formats import BadLine, Reader, Sample
from tokenclean.data.planted import PlantedSettings, write_planted
from tokenclean.models import BaseConfig, Network
from tokenclean.publish import MANIFEST

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def of(folder: str) -> list[Path]:
    return [path for path in CONFIGS if path.parent.name == folder]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_no_folder_is_forgotten() -> None:
    assert {p.parent.name for p in CONFIGS} == {
        *("ablations", "clean", "data", "evaluate", "fit", "model", "score", "select", "study")
    }
    keeps = {
        yaml.safe_load(p.read_text())["selection"]["keep"]
        for p in of("ablations")
        if "0." in p.stem
    }
    assert keeps == {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_opens_with_its_command_and_the_command_parses(path: Path) -> None:
    """Every command in a file's opening comment names files that exist and that file itself."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(
        line[2:] for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]
    )
    joined = comment.replace("\\\n", " ")
    commands = [
        line.strip() for line in joined.splitlines() if re.match(r"  +(tokenclean|python) ", line)
    ]
    assert commands, f"{path.name} does not say how it is run"
    for command in commands:
        words = shlex.split(command)
        configs = [words[i + 1] for i, word in enumerate(words) if word == "-c"]
        assert all((ROOT / c).is_file() for c in configs), command
        if words[0] == "tokenclean":
            assert words[1] in cli.VERBS
        elif words[1] != "-m":
            assert (ROOT / words[1]).is_file(), command
    if path.parent.name not in ("data", "model"):
        assert any(str(path.relative_to(ROOT)) in command for command in commands)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small planted file in the working directory's stead."""
    folder = tmp_path_factory.mktemp("configs")
    rows = [
        conversation(f"Say {i}.", f"It is {i}. Bye.", id=f"s{i}", source="s", truth=[[1, 7, 9, 0]])
        for i in range(12)
    ]
    write_jsonl(folder / "pool.jsonl", rows)
    return folder


def small(place: Path, model: Path) -> list[str]:
    """Overrides that shrink any run to twelve samples on a two-layer model."""
    return [
        *("--model.base.name", str(model), "--data.path", str(place / "pool.jsonl")),
        *("--data.validation_path", "null", "--data.validation_share", "0"),
        *("--data.test_path", "null", "--data.max_length", "64"),
        *("--data.cache_dir", str(place / "cache"), "--outputs", str(place / "outputs")),
        *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        *("--trainer.precision", "32-true"),
    ]


PLANTED = ("model/planted", "data/planted", "fit/planted", "clean/planted")


def chosen(*names: str) -> list[str]:
    return [word for n in names for word in ("-c", str(ROOT / "configs" / f"{n}.yaml"))]


@pytest.mark.parametrize("path", [p for p in of("clean") if p.stem != "planted"], ids=name)
def test_clean_configs_run(path: Path, place: Path, model_folder: Path) -> None:
    options = small(place, model_folder)
    arms = list(yaml.safe_load(path.read_text())["loop"]["arms"])
    quick = ["--loop.warmup_epochs", "1", "--trainer.max_epochs", "1", "--name", path.stem]
    if path.stem == "stm":  # random weights find every token unlikely
        arm = {"schedule": "fixed_model", "rule": "stm", "options": {"max_perplexity": 1e4}}
        quick += ["--loop.arms", json.dumps({"stm": arm})]
    cli.main(["clean", *chosen(*PLANTED, name(path)), *options, *quick])
    results = json.loads((place / "outputs" / path.stem / "results.json").read_text())
    assert [r["name"] for r in results] == ["base", *arms]


@pytest.mark.parametrize("path", of("ablations"), ids=name)
def test_ablations_run_on_top(path: Path, place: Path, model_folder: Path) -> None:
    options = small(place, model_folder)
    quick = ["--loop.warmup_epochs", "1", "--trainer.max_epochs", "1", "--name", path.stem]
    stack = chosen(*PLANTED, "clean/self_evolving", name(path))
    cli.main(["clean", *stack, *options, *quick])
    folder = place / "outputs" / path.stem
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    for group, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items():
            assert stored[group][key] == value
    if path.stem.startswith("keep_0"):
        keep = float(path.stem.removeprefix("keep_"))
        arm = folder / "arms" / "self_evolving"
        for number in range(1, 5):
            manifest = json.loads((arm / f"round_{number}" / "cleaned" / MANIFEST).read_text())
            assert manifest["kept_tokens"] == int(manifest["ranked_tokens"] * keep)


@pytest.mark.parametrize("path", [p for p in of("fit") if p.stem != "four_bit"], ids=name)
def test_fit_configs_run(path: Path, place: Path, model_folder: Path) -> None:
    run = f"fit-{path.stem}"
    cli.main(["fit", *chosen(name(path)), *small(place, model_folder), "--name", run])
    assert (place / "outputs" / run / "summary.json").is_file()


def test_four_bit_says_what_it_needs(
    place: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand: the refusal cannot be seen")
    with pytest.raises(SystemExit):
        cli.main(["fit", *chosen("fit/four_bit"), *small(place, model_folder), "--name", "4bit"])
    assert "model.base.load_in_4bit: needs a GPU" in capsys.readouterr().err


def test_score_and_select_configs_run(place: Path, model_folder: Path) -> None:
    options = small(place, model_folder)
    outputs = place / "outputs"
    cli.main(["fit", *chosen("fit/planted"), *options, "--name", "reference-model"])
    cli.main(["score", *options, "--name", "base"])
    adapter = json.dumps([str(outputs / "reference-model" / "adapter")])
    for path in of("score"):
        over = ["--model.adapters", adapter, "--name", path.stem]
        over += ["--model.attributes.experts", "maths"]
        cli.main(["score", *chosen(name(path)), *options, *over])
    for path in of("select"):
        base = {"pmi": "alone", "xtf_paper": "xtf", "xtf_code": "xtf"}.get(path.stem)
        if base is not None:
            tables = ["--base", str(outputs / base)]
        else:
            reference = "reference_gap" if path.stem == "contradiction" else "reference"
            tables = ["--base", str(outputs / "base"), "--reference", str(outputs / reference)]
        run = f"select-{path.stem}"
        cli.main(["select", *chosen(name(path)), *tables, "--outputs", str(outputs), "--name", run])
        manifest = json.loads((outputs / run / "cleaned" / MANIFEST).read_text())
        assert manifest["selection"] == {
            **manifest["selection"],
            **yaml.safe_load(path.read_text())["selection"],
        }


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


#: main first: some others read its runs
STUDIES: list[Path] = sorted(of("study"), key=lambda path: (path.stem != "main", str(path)))


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_study_configs_run(path: Path, studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick form of every study, smaller still; those that read main's runs come after it."""
    monkeypatch.chdir(ROOT)
    study = yaml.safe_load(path.read_text())["study"]
    words = ["study", "-c", str(path), "--outputs", str(studies)]
    if "of" in study:
        words += ["--study.of", str(studies / "main_quick")]
    else:
        quick = study["quick"]
        pool = {"samples": 40, "validation": 8, "test_per_family": 1}
        options = {**quick["options"], "data.cache_dir": str(studies / "cache")}
        words += ["--quick", "--study.quick.planted", json.dumps(pool)]
        words += ["--study.quick.options", json.dumps(options)]
        words += ["--study.quick.variants", json.dumps(quick.get("variants", [None])[:2])]
        words = words if "variants" in quick else words[:-2]
    cli.main(words)
    folder = studies / (path.stem if "of" in study else f"{path.stem}_quick")
    stored = json.loads((folder / "study.json").read_text())
    assert stored["reports"] == study["reports"]
    assert not any(cell["failed"] for cell in stored["cells"])
    assert len((folder / "results.md").read_text().splitlines()) > 5


def llama3_rope(factor: float) -> dict[str, Any]:
    """Rotary scaling as Llama 3.1 and 3.2 publish it, but for the factor."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }


#: The three published shapes, with every dimension shrunk and the rest as published.
SHRUNKEN = {
    "llama-3.2-3b": LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters=llama3_rope(32.0),
    ),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=96,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters=llama3_rope(8.0),
    ),
    "mistral-7b-v0.3": MistralConfig(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=96,
        num_hidden_layers=2,
        sliding_window=None,
        max_position_embeddings=32768,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
    ),
}


@pytest.mark.parametrize("path", [p for p in of("model") if p.stem != "planted"], ids=name)
def test_the_papers_models_run_with_random_weights(path: Path, place: Path) -> None:
    """Parse, instantiate, score and train the paper's LoRA on a shrunken model of the shape."""
    config = SHRUNKEN[path.stem]
    folder = place / path.stem
    torch.manual_seed(0)
    kind: Any = MistralForCausalLM if isinstance(config, MistralConfig) else LlamaForCausalLM
    kind(config).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    assert Network.load(BaseConfig(name=str(folder))).layout == "packed"
    stack = chosen(name(path), "data/ds2_50k", "fit/paper")
    run = f"paper-{path.stem}"
    cli.main(["fit", *stack, *small(place, folder), "--data.max_length", "64", "--name", run])
    written = json.loads((place / "outputs" / run / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (64, 16, 0.1)
    assert len(written["target_modules"]) == 7
    stack = chosen(name(path), "data/ds2_50k")
    cli.main(["score", *stack, *small(place, folder), "--name", f"{run}-scores"])


#: One row as each source publishes it, and the turns it must become.
PUBLISHED_ROWS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "..."},
        ["Add.\n\n1 2", "3"],
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "closed_qa"},
        ["Who?\n\nAnn.", "Ann"],
    ),
    "wizardlm": (
        {
            "idx": "w1",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
        },
        ["Hi", "Yo"],
    ),
    "flan_v2": ({"inputs": "2+2?", "targets": "4", "task": "math"}, ["2+2?", "4"]),
    "oasst1": (conversation("Why?", "Because."), ["Why?", "Because."]),
    "ds2_50k": (conversation("Why?", "Because.", dataset="dolly"), ["Why?", "Because."]),
}


@pytest.mark.parametrize(
    "path", [p for p in of("data") if not p.stem.startswith("planted")], ids=name
)
def test_data_configs_read_their_source(path: Path, place: Path, model_folder: Path) -> None:
    row, turns = PUBLISHED_ROWS[path.stem]
    file = write_jsonl(place / f"{path.stem}.jsonl", [row] * 1)
    settings = yaml.safe_load(path.read_text())["data"]
    samples = list(Reader([str(file)], id_column=settings.get("id_column", "id")))
    assert not any(isinstance(s, BadLine) for s in samples)
    assert [[m.content for m in s.messages] for s in samples if isinstance(s, Sample)] == [turns]
    options = [*small(place, model_folder), "--data.path", str(file)]
    cli.main(["score", *chosen(name(path)), *options, "--name", f"data-{path.stem}"])


@pytest.mark.parametrize("path", [p for p in of("data") if p.stem.startswith("planted")], ids=name)
def test_embedded_data_configs_name_what_the_generator_writes(path: Path, place: Path) -> None:
    settings = yaml.safe_load(path.read_text())["data"]
    write_planted(place / path.stem, PlantedSettings(samples=16))
    written = {p.name for p in (place / path.stem).iterdir()}
    paths = [Path(settings[k]) for k in ("path", "validation_path", "test_path")]
    assert {p.name for p in paths} <= written
    assert {str(p.parent) for p in paths} == {f"outputs/{path.stem}"}
