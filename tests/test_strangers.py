"""Models, adapters, checkpoints and configurations from elsewhere that are not what they say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_trust import CHECKPOINT, DDP, TENSORBOARD, of, parse, tree

from tokenclean.checkpoints import CheckpointFiles, newest_checkpoint, read_checkpoint
from tokenclean.models import BaseConfig, LoraSettings, Network, trained_ids
from tokenclean.models.adapters import TRAINED_IDS, WEIGHTS, check_adapter_folder
from tokenclean.models.loading import load_config
from tokenclean.trust import trusting

assert parse  # the fixture: a parser of `clean`
PROFILER = "lightning.pytorch.profilers.SimpleProfiler"
CSV = "lightning.pytorch.loggers.CSVLogger"


# -- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    network = Network.load(BaseConfig(str(model_folder)))
    network.add_adapter(LoraSettings(r=4, alpha=4, target_modules=["q_proj", "v_proj"]))
    network.save_last_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace(".layers.", ".blocks."): v for k, v in state.items()}


def one_lacking(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if "layers.1.self_attn.v_proj.lora_B" not in k}


def one_more(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "base_model.model.model.layers.7.self_attn.v_proj.lora_A.weight"
    return {**state, name: torch.zeros(4, 32)}


def wider(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros(v.shape[0] + 1, v.shape[1] + 1) for k, v in state.items()}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (renamed, r"no module takes .*\.blocks\.0\..*it lacks .*\.layers\.0\."),
        (one_lacking, r"\(it lacks .*layers\.1\.self_attn\.v_proj\.lora_B\.weight\)"),
        (one_more, r"\(no module takes .*layers\.7\.self_attn"),
        (wider, "size mismatch"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("below", [False, True])
def test_an_adapter_of_another_model_is_refused(
    other: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    said: str,
    below: bool,
    adapter: Path,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    save_file(other(load_file(adapter / WEIGHTS)), foreign / WEIGHTS)
    network = Network.load(BaseConfig(str(model_folder)))
    if below:
        network.load_adapter(adapter)
    with pytest.raises(ValueError, match=said) as caught:
        network.load_adapter(foreign)
    assert f"model.adapters: {foreign} does not fit model.base" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_modules", "([a-z0-9_.]+)+X"),
        ("target_modules", ["q_proj", "([a-z0-9_.]+)+X"]),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", 3),
        ("exclude_modules", "([a-z0-9_.]+)+X"),
        ("exclude_modules", [".*"]),
        ("layers_pattern", "([a-z0-9_.]+)+X"),
        ("layers_pattern", ["([a-z0-9_.]+)+X"]),
    ],
)
def test_an_adapters_names_are_no_expressions(option: str, value: Any, adapter: Path) -> None:
    change(adapter / "adapter_config.json", **{option: value})
    with pytest.raises(ValueError, match=rf"model\.adapters: {option} of .*plain module names"):
        check_adapter_folder(adapter)


def test_plain_names_of_adapters_are_taken(adapter: Path) -> None:
    for value in ("all-linear", ["q_proj", "layers.0.self_attn.v_proj"], []):
        change(adapter / "adapter_config.json", target_modules=value, layers_pattern="layers")
        check_adapter_folder(adapter)
    (adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no configuration of an adapter"):
        check_adapter_folder(adapter)


@pytest.mark.parametrize("content", ['"abc"', '["a", 1]', '{"a": 1}', "null", "3"])
def test_trained_ids_are_a_list_of_texts(content: str, tmp_path: Path) -> None:
    (tmp_path / TRAINED_IDS).write_text(content)
    with pytest.raises(ValueError, match=rf"{TRAINED_IDS} is no list of ids"):
        trained_ids(tmp_path)
    (tmp_path / TRAINED_IDS).write_text('["a", "b"]')
    assert trained_ids(tmp_path) == ["a", "b"]


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "most"),
    [
        ("num_hidden_layers", 3, 2),
        ("num_hidden_layers", 3_000_000_000, 2),
        ("vocab_size", 4_000_000_000, None),
        ("hidden_size", 100_000_000, None),
        ("intermediate_size", 1e12, None),
        ("head_dim", 1e12, None),
        ("num_attention_heads", float("nan"), None),
    ],
)
def test_a_configuration_larger_than_its_weights(
    option: str, value: float, most: int | None, model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    load_config(BaseConfig(str(folder)))
    change(folder / "config.json", **{option: value})
    said = rf"model\.base\.name: .*config\.json states {option} .*have {most or ''}"
    with pytest.raises(ValueError, match=said):
        load_config(BaseConfig(str(folder)))


def test_weights_of_other_shapes_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    change(folder / "config.json", intermediate_size=48)
    with pytest.raises(ValueError, match=r"model\.base\.name: .* could not be loaded") as caught:
        Network.load(BaseConfig(str(folder)))
    assert "\n" not in str(caught.value)


# -- checkpoints ----------------------------------------------------------------------------------


class Calls:
    """A pickle that calls something when it is loaded."""

    def __init__(self, what: Any, *given: Any):
        self.call = what, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def checkpoint(path: Path, loops: Any) -> Path:
    value = {"state_dict": {"w": torch.arange(8.0)}, "global_step": 1, "loops": loops}
    torch.save(value, path)
    return path


@pytest.mark.parametrize(
    ("what", "size", "named"),
    [
        (bytearray, 2_000_000_000, "bytearray"),
        (torch.storage.UntypedStorage, 2_000_000_000, "UntypedStorage"),
        (torch.FloatTensor, 500_000_000, "FloatTensor"),
    ],
)
def test_a_small_checkpoint_takes_little_memory(
    what: Any, size: int, named: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path / "step-00000001.ckpt", Calls(what, size))
    assert path.stat().st_size < 3000
    for whole in (True, False):
        with pytest.raises(
            ValueError, match=rf"is no whole checkpoint \(it names .*{named}, which"
        ):
            read_checkpoint(path, whole)
    assert newest_checkpoint(tmp_path) is None


def test_what_checkpoints_hold_is_read(tmp_path: Path) -> None:
    """Parameters, types of all kinds, sets and shapes; written by torch itself."""
    held = {
        "p": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "half": torch.ones(2, dtype=torch.float16),
        "bool": torch.ones(2, dtype=torch.bool),
        "rng": torch.get_rng_state(),
        "plain": {"a": [1, 2.5, None, True, "x", b"yz", (1, 2), {3}]},
        "shape": torch.Size([2, 3]),
        "dtype": torch.float32,
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    }
    path = tmp_path / "step-00000001.ckpt"
    CheckpointFiles().save_checkpoint(
        {"state_dict": {"w": torch.ones(3)}, "global_step": 1, "loops": held}, path
    )
    for whole in (True, False):
        assert read_checkpoint(path, whole)["loops"]["plain"] == held["plain"]


def test_a_checkpoint_packed_otherwise_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "good.ckpt", {})
    read_checkpoint(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    plan = next(name for name in members if name.endswith("/data.pkl"))

    def packed(name: str, how: int, members: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", how) as file:
            for member, content in members.items():
                file.writestr(member, content)
        return tmp_path / name

    stack_global = pickle.dumps(Calls(bytearray, 5), protocol=4)
    wrong = {
        "it is compressed": packed("a.ckpt", zipfile.ZIP_DEFLATED, members),
        "no data.pkl": packed("b.ckpt", zipfile.ZIP_STORED, {"x/version": b"3"}),
        "STACK_GLOBAL": packed("c.ckpt", zipfile.ZIP_STORED, {**members, plan: stack_global}),
    }
    for said, made in wrong.items():
        with pytest.raises(ValueError, match=f"is no whole checkpoint.*{said}"):
            read_checkpoint(made)


# -- configurations -------------------------------------------------------------------------------


OUTSIDE: list[tuple[str, Any, str]] = [
    ("trainer.default_root_dir", "/elsewhere", "default_root_dir"),
    ("trainer.default_root_dir", "../elsewhere", "default_root_dir"),
    ("trainer.default_root_dir", "~/elsewhere", "default_root_dir"),
    ("trainer.logger", of(TENSORBOARD, save_dir="/elsewhere"), "save_dir"),
    ("trainer.logger", of(TENSORBOARD, save_dir="x", name="../../y"), "name"),
    ("trainer.logger", of("CSVLogger", save_dir="s3://bucket"), "save_dir"),
    ("trainer.logger", [of(CSV, save_dir="a/../../b")], "save_dir"),
    ("trainer.logger", {"init_args": {"save_dir": "/elsewhere"}}, "save_dir"),
    ("trainer.callbacks", [of(CHECKPOINT, dirpath="/elsewhere")], "dirpath"),
    ("trainer.callbacks", [of(CHECKPOINT, filename="../../x")], "filename"),
    ("trainer.profiler", of(PROFILER, dirpath="/elsewhere", filename="x"), "dirpath"),
    ("trainer.profiler", of(PROFILER, filename="/elsewhere"), "filename"),
]


@pytest.mark.parametrize(("option", "value", "named"), OUTSIDE)
def test_a_configuration_leads_out_of_its_folder(
    option: str, value: Any, named: str, tmp_path: Path, parse: Callable[..., Any]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree(option, value)))
    group, _, rest = option.partition(".")
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(tree(rest, value)))
    for argv in (["-c", str(path)], [f"--{group}", str(tmp_path / "part.yaml")]):
        with pytest.raises(ValueError, match=rf"{named}: .* leads out of the working folder"):
            parse(*argv)


def test_where_folders_may_be_named(tmp_path: Path, parse: Callable[..., Any]) -> None:
    outside = str(tmp_path / "elsewhere")
    assert parse("--trainer.default_root_dir", outside).trainer.default_root_dir == outside
    words = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", outside)
    assert parse(*words).trainer.logger.init_args.save_dir == outside
    path = tmp_path / "c.yaml"
    inside = {
        "logger": of(CSV, save_dir="logs", name="a.b", version=3),
        "callbacks": [of(CHECKPOINT, dirpath="x/y", filename="{epoch}-{step}")],
        "strategy": of(DDP, find_unused_parameters=True),
    }
    path.write_text(yaml.safe_dump({"trainer": inside, "data": {"cache_dir": outside}}))
    assert parse("-c", str(path)).data.cache_dir == outside
    path.write_text(yaml.safe_dump({"trainer": {"logger": of(CSV, save_dir=outside)}}))
    with pytest.raises(ValueError, match=f"--trust_import {CSV}"):
        parse("-c", str(path))
    with trusting(["--trust_import", CSV]):
        assert parse("-c", str(path)).trainer.logger.init_args.save_dir == outside


@pytest.mark.parametrize("option", ["data", "trainer", "data.path", "model.base.name"])
def test_a_configuration_names_a_pipe(
    option: str, tmp_path: Path, parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for ever for somebody to write."""
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "c.yaml"
    for value in (str(tmp_path / "pipe"), f"file://{tmp_path}/pipe"):
        path.write_text(yaml.safe_dump(tree(option, value)))
        with pytest.raises(ValueError, match=rf"{option}: .*pipe' is no regular file"):
            parse("-c", str(path))
    path.write_text(yaml.safe_dump(tree(option, "pipe")))
    if "." not in option:  # relative to the file
        with pytest.raises(ValueError, match=rf"{option}: 'pipe' is no regular file"):
            parse("-c", str(path))
