"""Exported adapters and merged models load elsewhere and are the run's own models."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import conversation, llama_nll_float64, write_jsonl
from peft import PeftModel
from test_export import Row, tree, write_pool
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenclean import cli
from tokenclean.data.planted import main as planted
from tokenclean.export.verb import export
from tokenclean.models import TRAINED_IDS, BaseConfig, LoraSettings, Network, load_tokenizer
from tokenclean.publish import write_json

PLANTED = Path(__file__).parent.parent / "tokenclean" / "data" / "planted_base"
LORA = LoraSettings(r=4, alpha=8, dropout=0.0)
IDS = list(range(5, 40))


def stacked(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Save an adapter made of two; returns what they add to each module's weight, float64."""
    network = Network.load(BaseConfig(str(base)))
    added: dict[str, torch.Tensor] = {}
    for seed in (1, 2):
        network.add_adapter(LORA)
        torch.manual_seed(seed)
        for name, parameter in network.named_parameters():
            if f".{network.stack[-1]}." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    for name, module in network.hf.named_modules():
        if hasattr(module, "lora_A"):
            added[name] = sum(
                (
                    module.lora_B[s].weight.detach().double()
                    @ module.lora_A[s].weight.detach().double()
                    * (LORA.alpha / LORA.r)
                    for s in network.stack
                ),
                torch.zeros(()),
            )
    network.save_stack(folder)
    write_json(folder / TRAINED_IDS, ["row-1"])
    return added


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of `clean` with one arm, made by hand, and what its adapter adds."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    tokenizer = AutoTokenizer.from_pretrained(PLANTED)
    arm = folder / "arms" / "one"
    ids = tokenizer("<|user|>\nHello.\n<|assistant|>\nYes.")["input_ids"]
    marks = "." * (len(ids) - 2) + "kd"
    write_pool(arm / "cleaned", [Row("a", ids, marks)], tokenizer)
    added = stacked(PLANTED, arm / "adapter")
    config = {
        "model": {"base": {"name": str(PLANTED)}, "lora": {"r": 4}},
        "loop": {"arms": {"one": {"schedule": "self_evolving", "rule": "token_cleaning"}}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder, added


@torch.no_grad()
def losses(model: Any) -> torch.Tensor:
    ids = torch.tensor([IDS])
    logits = model.eval()(input_ids=ids).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def code_of(folder: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)[0]


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_an_arms_model_is_the_base_plus_its_adapters(
    to: str, run: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, added = run
    export([str(place), "--to", to])
    folder = place / "export" / to
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(code_of(folder).replace('"BASE"', repr(str(PLANTED))), scope)
    plain = AutoModelForCausalLM.from_pretrained(PLANTED, dtype=torch.float32)
    want = llama_nll_float64(plain, IDS, added)
    assert (llama_nll_float64(plain, IDS) - want).abs().max() > 0.1
    torch.testing.assert_close(losses(scope["model"]), want, rtol=0, atol=1e-4)
    assert (
        scope["tokenizer"]("Yes.")["input_ids"]
        == load_tokenizer(BaseConfig(str(PLANTED)))("Yes.")["input_ids"]
    )


def test_the_adapter_names_the_base_as_the_run_does(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    place, _ = run
    export([str(place), "--to", "adapter", "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(PLANTED)
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert not (tmp_path / "out" / TRAINED_IDS).exists()
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("library_name: peft", "r = 8, alpha = 16 (several of r = 4 joined)", "0123-4567"):
        assert said in card
    assert str(PLANTED.parent) not in card and str(place) not in card
    note = json.loads((tmp_path / "out" / "tokenclean.json").read_text())
    assert (note["kind"], note["format"], note["arm"]) == ("export", "adapter", "one")


def of_base(run: Path, folder: Path, **base: Any) -> Path:
    """A copy of the run that names its base differently."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("export"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["base"] = base
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_an_adapters_card_loads_the_base_as_the_run_did(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    base = {"name": "owner/model", "revision": "v1", "trust_remote_code": True}
    for name, more, tokens in (
        ("own", {}, ("owner/model", {"revision": "v1", "trust_remote_code": True})),
        ("other", {"tokenizer": "owner/tok"}, ("owner/tok", {"trust_remote_code": True})),
        ("local", {"tokenizer": "/some/tok"}, ("TOKENIZER", {"trust_remote_code": True})),
    ):
        folder = of_base(run[0], tmp_path / name, **base, **more) / "export" / "adapter"
        export([str(tmp_path / name), "--to", "adapter"])
        stored = json.loads((folder / "adapter_config.json").read_text())
        assert (stored["base_model_name_or_path"], stored["revision"]) == ("owner/model", "v1")
        head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
        assert head["base_model"] == "owner/model"
        calls.clear()
        with monkeypatch.context() as patch:
            for kind in (AutoModelForCausalLM, AutoTokenizer, PeftModel):
                patch.setattr(kind, "from_pretrained", lambda *a, **k: calls.append((a, k)))
            patch.chdir(folder)
            exec(code_of(folder), {})
        (model, _, tokenizer) = calls
        settings = {"revision": "v1", "trust_remote_code": True, "dtype": torch.float32}
        assert model == (("owner/model",), settings)
        assert tokenizer == ((tokens[0],), tokens[1])


def test_an_adapter_of_a_local_base_is_not_published(
    run: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    for number, name in enumerate((str(PLANTED), "models/tiny")):
        place = of_base(run[0], tmp_path / "outputs" / str(number), name=name)
        with pytest.raises(ValueError, match=r"stands on .* nobody else can load; push --to merg"):
            export([str(place), "--to", "adapter", "--push_to_hub", "me/adapter"])
        assert not (place / "export").exists()
        export([str(place), "--to", "adapter"])
        stored = json.loads((place / "export" / "adapter" / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] == name
        card = (place / "export" / "adapter" / "README.md").read_text()
        assert "base_model" not in yaml.safe_load(card.split("---")[1])
        assert f"{name} is a folder, which others do not have" in caplog.text
        seen = f"{'models/tiny' if number else PLANTED.name}, seen from where the run was made"
        assert f'\nbase = "BASE"  # the run\'s base: {seen}\n' in card


def test_a_base_with_code_of_its_own_is_read_with_it(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = of_base(run[0], tmp_path / "run", name=str(PLANTED), trust_remote_code=True)
    trusted = []
    plain = AutoModelForCausalLM.from_pretrained

    def recorded(*names: Any, **settings: Any) -> Any:
        trusted.append(settings.get("trust_remote_code"))
        return plain(*names, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    merge = [str(place), "--to", "merged", "--dtype", "bfloat16"]
    export(merge)
    # the base, and the sum in float32 to be rounded; what a run says of itself is no permission
    assert trusted == [False, False]
    export([*merge, "--trust_remote_code", "--overwrite"])
    assert trusted[2:] == [True, True]
    card = (place / "export" / "merged" / "README.md").read_text()
    assert card.count("trust_remote_code=True") == 3
    assert "| stored as | bfloat16, added up in float32 |" in card


@pytest.mark.parametrize("what", ["alpha", "base"])
def test_other_settings_or_another_base_are_another_model(
    what: str, run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(PLANTED, tmp_path / "base")
    place = of_base(run[0], tmp_path / "run", name=str(tmp_path / "base"))
    for to in ("adapter", "merged"):
        export([str(place), "--to", to])
    adapter = place / "arms" / "one" / "adapter"
    path = (adapter / "adapter_config.json") if what == "alpha" else tmp_path / "base/config.json"
    changed = {"lora_alpha": 32} if what == "alpha" else {"rms_norm_eps": 1e-3}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match="holds another export"):
        export([str(place), "--to", "merged"])
    if what == "alpha":
        with pytest.raises(ValueError, match="holds another export"):
            export([str(place), "--to", "adapter"])
    else:  # it only names its base
        export([str(place), "--to", "adapter"])


def test_models_are_the_same_bytes_again(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for to in ("adapter", "merged"):
        for name in ("one", "two"):
            export([str(run[0]), "--to", to, "--out", str(tmp_path / name / to)])
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    for name, content in tree(tmp_path / "one" / "merged").items():
        assert str(PLANTED.parent).encode() not in content, name


def test_another_dtype_is_rounded_to_once(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    place, added = run
    out = tmp_path / "out"
    export([str(place), "--to", "merged", "--dtype", "bfloat16", "--out", str(out)])
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(PLANTED, dtype=torch.float32).state_dict()
    for name, delta in added.items():
        want = (plain[f"{name}.weight"].double() + delta).to(torch.float32)
        got = found[f"{name}.weight"]
        assert got.dtype == torch.bfloat16
        # the sums may differ in float32's last bits, and so by one step of bfloat16, if rarely
        assert (got == want.to(torch.bfloat16)).double().mean() > 0.999
    assert not (out / "float32").exists()


def test_an_adapter_as_it_is_saved_has_a_card_of_ours(
    run: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    card = (run[0] / "arms" / "one" / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "# Adapter of planted_base" in card and "r = 8, alpha = 16" in card
    assert str(PLANTED.parent) not in card


def test_a_run_of_fit_on_a_cleaned_pool_says_how_it_was_cleaned(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    place, _ = run
    shutil.copytree(place / "arms" / "one" / "adapter", tmp_path / "fit" / "adapter")
    config = {
        "model": {"base": {"name": str(PLANTED)}, "lora": {"r": 4}},
        "data": {"path": str(place / "arms" / "one" / "cleaned"), "batch_size": 48},
    }
    (tmp_path / "fit" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"--arm: .* is a run of `fit`"):
        export([str(tmp_path / "fit"), "--to", "adapter", "--arm", "one"])
    export([str(tmp_path / "fit"), "--to", "adapter"])
    card = (tmp_path / "fit" / "export" / "adapter" / "README.md").read_text()
    for said in ("| samples per step | 48 |", "| token pool | 0123-4567 |", "| cut | 0.125 |"):
        assert said in card
    config["data"] = {"path": "gone"}
    (tmp_path / "fit" / "config.yaml").write_text(yaml.safe_dump(config))
    export([str(tmp_path / "fit"), "--to", "adapter", "--overwrite"])
    card = (tmp_path / "fit" / "export" / "adapter" / "README.md").read_text()
    assert "## Training" in card and "## Data" not in card


def test_runs_of_fit(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [conversation(f"Say {i}.", f"It is {i}.", id=f"s{i}") for i in range(8)]
    common = [
        *("--model.base.name", str(model_folder), "--outputs", str(tmp_path)),
        *("--data.path", str(write_jsonl(tmp_path / "pool.jsonl", rows))),
        *("--data.cache_dir", str(tmp_path / "cache"), "--data.max_length", "64"),
        *("--data.batch_size", "4", "--trainer.enable_progress_bar", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "false"),
        *("--model.optimizer", json.dumps(ADAM)),
    ]
    cli.main(["fit", *common, "--model.lora.r", "4", "--model.save_merged", "true", "--name", "a"])
    cli.main(["fit", *common, "--model.lora", "null", "--name", "full"])
    run = tmp_path / "a"
    for to in ("adapter", "merged"):
        export([str(run), "--to", to])
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = losses(base)
    own = losses(AutoModelForCausalLM.from_pretrained(run / "merged"))
    assert (own - before).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    torch.testing.assert_close(losses(merged), own, rtol=0, atol=1e-6)
    adapted = PeftModel.from_pretrained(base, run / "export" / "adapter")
    torch.testing.assert_close(losses(adapted), own, rtol=0, atol=1e-4)

    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path / "full"), "--to", "adapter"])
    assert "is a whole model" in capsys.readouterr().err
    export([str(tmp_path / "full"), "--to", "merged"])
    whole = losses(AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model"))
    assert (whole - before).abs().max() > 0.01
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "export" / "merged")
    torch.testing.assert_close(losses(again), whole, rtol=0, atol=0)
    AutoTokenizer.from_pretrained(tmp_path / "full" / "export" / "merged")
    card = (tmp_path / "full" / "export" / "merged" / "README.md").read_text()
    assert "all weights" in card and "| stored as | float32 |" in card


ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
TASK = "planted_choice_capital"
TASKS = PLANTED.parent.parent / "evaluation" / "tasks"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    planted(["--out", str(folder), "--samples", "20"])
    return folder / "test.jsonl"


def asked(model_args: str, questions: Path) -> list[float]:
    """Log-likelihoods of the choices of the first four questions."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"planted_test": str(questions)}
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"{model_args},dtype=float32",
        tasks=[TASK],
        task_manager=manager,
        limit=4,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    assert found is not None
    return [float(r[0]) for s in found["samples"][TASK] for r in s["filtered_resps"]]


def test_lm_eval_gives_the_same_values(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, questions: Path
) -> None:
    for to in ("adapter", "merged"):
        export([str(run[0]), "--to", to, "--out", str(tmp_path / to)])
    own = asked(f"pretrained={PLANTED},peft={run[0] / 'arms' / 'one' / 'adapter'}", questions)
    assert len(own) == 16
    adapter = asked(f"pretrained={PLANTED},peft={tmp_path / 'adapter'}", questions)
    merged = asked(f"pretrained={tmp_path / 'merged'}", questions)
    base = asked(f"pretrained={PLANTED}", questions)
    assert adapter == own
    assert merged == pytest.approx(own, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(base, own, strict=True)) > 0.1


@pytest.mark.slow
def test_lm_evals_own_command(
    run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, questions: Path
) -> None:
    export([str(run[0]), "--to", "adapter", "--out", str(tmp_path / "adapter")])
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", TASK, "--limit", "4"),
        *("--model_args", f"pretrained={PLANTED},peft={tmp_path / 'adapter'},dtype=float32"),
        *("--include_path", str(TASKS), "--device", "cpu", "--output_path", str(tmp_path / "out")),
        *("--metadata", json.dumps({"planted_test": str(questions)})),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0.0 <= json.loads(results.read_text())["results"][TASK]["acc,none"] <= 1.0
