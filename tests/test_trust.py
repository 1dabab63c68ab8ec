"""Configurations, run folders and models from elsewhere cannot run code, nor leave their folder."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from conftest import write_jsonl
from jsonargparse import Namespace
from safetensors.torch import save_file

from tokenclean import cli, commands, parsing, trust
from tokenclean.cleaning.arms import Arm, LoopConfig
from tokenclean.data.datamodule import TuluDataModule
from tokenclean.evaluation import verb as evaluation
from tokenclean.evaluation.benchmarks import Column, Source
from tokenclean.models import BaseConfig, LoraSettings, Network, check_base, load_tokenizer
from tokenclean.models.adapters import check_adapter_folder
from tokenclean.models.loading import Speed, load_config
from tokenclean.scoring.attributes import AttributeSettings
from tokenclean.scoring.module import ScoringModule
from tokenclean.selection.select import SelectionConfig
from tokenclean.study.config import Quick, Reference, StudyConfig, Variant
from tokenclean.training.module import CleanedSFTModule
from tokenclean.trust import check_yaml, read_yaml, safe_name, trusting

ROOT = Path(__file__).parent.parent

GADGET = """
import os, pathlib
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy

pathlib.Path(os.environ["WITNESS"]).touch()

class Optimiser(torch.optim.SGD):
    pass

class Watcher(Callback):
    pass

def optimiser(params) -> torch.optim.Optimizer:
    return torch.optim.SGD(params)
"""


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that any gadget makes; a module ``gadget`` that makes it when it is imported."""
    place = tmp_path / "witness"
    (tmp_path / "gadget.py").write_text(GADGET)
    monkeypatch.setenv("WITNESS", str(place))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("gadget", None)
    yield place
    sys.modules.pop("gadget", None)


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.place),))


class _Parsed(commands._Cli):
    """The real parser; nothing is made of what it parses."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


BASE = ["--model.base.name", "none", "--data.path", "none.jsonl"]


@pytest.fixture(scope="module")
def parse() -> Callable[..., Any]:
    """What `clean` makes of a configuration and options: parsed and checked, as before any run."""
    arms = ["--loop.arms", '{"full": {"schedule": "fixed_model", "rule": "full"}}']
    made = _Parsed("clean", CleanedSFTModule, [*BASE, *arms], "32-true")

    def run(*argv: str) -> Any:
        return made.parser.parse_args([*BASE, *arms, *argv])

    return run


def tree(option: str, value: Any) -> dict[str, Any]:
    for part in reversed(option.split(".")):
        value = {part: value}
    return value


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch $WITNESS"}}
LOAD = {"class_path": "torch.load", "init_args": {"f": "PICKLE", "weights_only": False}}
OPTIMISER = {"class_path": "gadget.Optimiser"}
WATCHER = {"class_path": "gadget.Watcher"}
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
DDP = "lightning.pytorch.strategies.DDPStrategy"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def of(path: str, **options: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": options}


#: option -> hostile value, and the path that the refusal names
HOSTILE: list[tuple[str, Any, str]] = [
    # as an optimizer, a callable of which only a class of torch.optim is wanted
    ("model.optimizer", SYSTEM, "os.system"),
    ("model.optimizer", "os.system", "os.system"),
    ("model.optimizer", LOAD, "torch.load"),
    ("model.optimizer", OPTIMISER, "gadget.Optimiser"),
    ("model.optimizer", "gadget.optimiser", "gadget.optimiser"),
    ("model.optimizer", "torch.optim.AdamW.load_state_dict", "load_state_dict"),
    ("model.optimizer", of("torch.optim.lr_scheduler.LambdaLR"), "LambdaLR"),
    ("model.optimizer", of("torch.optim.optimizer.sys.exit"), "torch.optim.optimizer.sys.exit"),
    ("model.optimizer", of("torch.optim.AdamW", lr=SYSTEM), "os.system"),
    (
        "model.optimizer",
        {"class_path": "torch.optim.AdamW", "dict_kwargs": {"x": LOAD}},
        "torch.load",
    ),
    # under the unions of the Trainer
    ("trainer.logger", SYSTEM, "os.system"),
    ("trainer.logger", [LOAD], "torch.load"),
    ("trainer.logger", of("lightning.pytorch.loggers.WandbLogger"), "WandbLogger"),
    ("trainer.callbacks", [SYSTEM], "os.system"),
    ("trainer.callbacks", WATCHER, "gadget.Watcher"),
    ("trainer.callbacks", ["gadget.Watcher"], "gadget.Watcher"),
    (
        "trainer.callbacks",
        [of("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.abort")],
        "LambdaCallback",
    ),
    ("trainer.strategy", SYSTEM, "os.system"),
    ("trainer.strategy", json.dumps(SYSTEM), "os.system"),
    ("trainer.strategy", "class_path: os.system", "os.system"),
    ("trainer.accelerator", LOAD, "torch.load"),
    ("trainer.plugins", [LOAD], "torch.load"),
    (
        "trainer.plugins",
        [of("lightning.pytorch.plugins.io.TorchCheckpointIO")],
        "TorchCheckpointIO",
    ),
    ("trainer.profiler", of("lightning.pytorch.profilers.PyTorchProfiler"), "PyTorchProfiler"),
    ("trainer.default_root_dir", SYSTEM, "os.system"),
    # inside what an allowed class takes: Any, object, functions, **kwargs
    ("trainer.logger", of(TENSORBOARD, save_dir="x", purge_step=SYSTEM), "os.system"),
    (
        "trainer.logger",
        {**of(TENSORBOARD, save_dir="x"), "dict_kwargs": {"a": [LOAD]}},
        "torch.load",
    ),
    ("trainer.strategy", of(DDP, ddp_comm_hook="os.system"), "os.system"),
    ("trainer.strategy", of(DDP, ddp_comm_state=LOAD), "torch.load"),
    ("trainer.strategy", of(DDP, ddp_comm_wrapper="gadget.optimiser"), "gadget.optimiser"),
    ("trainer.strategy", of(DDP, checkpoint_io=of("gadget.Watcher")), "gadget.Watcher"),
    ("trainer.strategy", {**of(DDP), "dict_kwargs": {"mixed_precision": LOAD}}, "torch.load"),
    # a class that is allowed, in another's hands
    ("trainer.strategy", of(DDP, ddp_comm_state=of("torch.optim.AdamW")), "torch.optim.AdamW"),
    ("trainer.strategy", of(DDP, ddp_comm_hook=f"{TENSORBOARD}.save"), "TensorBoardLogger.save"),
    ("trainer.callbacks", [of(CHECKPOINT, dirpath=LOAD)], "torch.load"),
    # our own: dataclasses, and mappings of plain values
    ("model.lora", OPTIMISER, "gadget.Optimiser"),
    ("model.base", SYSTEM, "os.system"),
    ("model.base.name", SYSTEM, "os.system"),
    ("model.weighting_options", SYSTEM, "os.system"),
    ("model.weighting_options", {"a": LOAD}, "torch.load"),
    ("selection.options", LOAD, "torch.load"),
    ("selection.options", {"a": "{class_path: os.system}"}, "os.system"),
    ("loop.arms", {"a": {"schedule": "fixed_model", "options": LOAD}}, "torch.load"),
    ("loop.arms", {"a": SYSTEM}, "os.system"),
    ("loop.arms", {"a": {"schedule": "fixed_model", "options": {"x": {"y": SYSTEM}}}}, "os.system"),
    ("loop.reference", SYSTEM, "os.system"),
    ("data.path", [SYSTEM], "os.system"),
    ("attributes.experts", [SYSTEM], "os.system"),
]


@pytest.mark.parametrize("way", ["file", "words", "part of a file"])
@pytest.mark.parametrize(("option", "value", "named"), HOSTILE)
def test_a_hostile_configuration(
    way: str,
    option: str,
    value: Any,
    named: str,
    tmp_path: Path,
    witness: Path,
    parse: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bomb = tmp_path / "bomb.pt"
    bomb.write_bytes(pickle.dumps(Bomb(witness)))
    value = json.loads(json.dumps(value).replace("PICKLE", str(bomb)))
    path = tmp_path / "hostile.yaml"
    if way == "file":
        path.write_text(yaml.safe_dump(tree(option, value)))
        argv = ["-c", str(path)]
    elif way == "words":
        argv = [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    else:
        group, _, rest = option.partition(".")
        path.write_text(yaml.safe_dump(tree(rest, value)))
        argv = [f"--{group}", str(path)]
    with pytest.raises((ValueError, SystemExit)) as refused:
        parse(*argv)
    said = f"{refused.value} {capsys.readouterr().err}"
    assert named in said and (way != "file" or option in said)
    assert not witness.exists() and "gadget" not in sys.modules
    if isinstance(refused.value, ValueError):
        assert "--trust_import" in said or "names a class" in said
    else:
        assert str(refused.value) == "2" and way != "file"


@pytest.mark.parametrize(
    ("option", "value", "path"),
    [
        ("model.optimizer", {"class_path": "torch.optim.AdamW"}, "torch.optim.AdamW"),
        ("model.optimizer", {"class_path": "torch.optim.adamw.AdamW"}, "torch.optim.AdamW"),
        ("model.optimizer", "SGD", "torch.optim.SGD"),
        ("trainer.logger", of("TensorBoardLogger", save_dir="x"), TENSORBOARD),
        ("trainer.logger", of("lightning.pytorch.loggers.csv_logs.CSVLogger", save_dir="x"), None),
        ("trainer.callbacks", of(CHECKPOINT, train_time_interval="1:00:00"), CHECKPOINT),
        ("trainer.strategy", of(DDP, find_unused_parameters=True), DDP),
        ("trainer.profiler", of("AdvancedProfiler", filename="x"), None),
        ("model.lora", {"class_path": "tokenclean.models.LoraSettings"}, None),
    ],
)
def test_what_a_configuration_may_name(
    option: str, value: Any, path: str | None, tmp_path: Path, parse: Callable[..., Any]
) -> None:
    (tmp_path / "usual.yaml").write_text(yaml.safe_dump(tree(option, value)))
    found = parse("-c", str(tmp_path / "usual.yaml"))[option]
    found = found[0] if isinstance(found, list) else found
    assert path is None or found.class_path == path


def test_every_class_on_the_list_takes_its_defaults(parse: Callable[..., Any]) -> None:
    """What a class has by default is plain data, or the check would refuse it."""
    places = {"optim": "model.optimizer", "loggers": "trainer.logger"}
    places |= {"callbacks": "trainer.callbacks", "strategies": "trainer.strategy"}
    places |= {"profilers": "trainer.profiler"}
    needed = {"EarlyStopping": {"monitor": "x"}, "TensorBoardLogger": {"save_dir": "x"}}
    needed["CSVLogger"] = {"save_dir": "x"}
    seen = 0
    once = {thing: path for path, thing in parsing.allowed().items()}
    for thing, path in once.items():
        place = next((p for word, p in places.items() if f".{word}." in path), None)
        if place is not None and inspect.isclass(thing):
            parse(f"--{place}={json.dumps(of(path, **needed.get(thing.__name__, {})))}")
            seen += 1
    assert seen > 25


# -- the command line's own word ------------------------------------------------------------------


def test_trust_lasts_for_one_command(
    witness: Path, parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--model.optimizer={json.dumps(OPTIMISER)}", "--trainer.callbacks=gadget.Watcher"]
    with trusting(["--trust_import", "gadget", *options]) as words:
        assert words == options and trust.trusted() == ("gadget",)
        parsing._follow_trust()
        assert parse(*words).model.optimizer.class_path == "gadget.Optimiser"
    assert witness.exists() and not trust.trusted()
    parsing._follow_trust()
    witness.unlink()
    sys.modules.pop("gadget")
    for option in options:
        with pytest.raises((ValueError, SystemExit)):
            parse(option)
    assert not witness.exists()
    with trusting(["--trust_import=gadget.Watcher", "--trust_import", "gadget.Watcher"]) as words:
        assert words == [] and trust.words() == ["--trust_import", "gadget.Watcher"]
        assert trust.is_trusted("gadget.Watcher") and trust.is_trusted("gadget.Watcher.x")
        assert not trust.is_trusted("gadget.Watchers") and not trust.is_trusted("gadget")


@pytest.mark.parametrize(
    "argv", [["--trust_import"], ["--trust_import", "a b"], ["--trust_import="]]
)
def test_trust_in_no_dotted_path(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="--trust_import"), trusting(argv):
        pass


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run the command line in this process; returns what it printed when it refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("verb", ["fit", "score", "select", "clean", "evaluate", "study"])
def test_no_configuration_grants_trust(
    verb: str, tmp_path: Path, witness: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trusting.yaml").write_text("trust_import: [gadget]\n")
    error = fails(capsys, verb, *("-c", str(tmp_path / "trusting.yaml")))
    assert "trust_import" in error and not trust.trusted()
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    assert "--trust_import PATH" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [{"trust_import": "gadget"}, {"config": "x"}, {"a --trust_import=os": 1}, {"name": "x"}],
)
def test_no_study_gives_its_runs_other_words(options: dict[str, Any]) -> None:
    for changes in (
        {"options": options},
        {"quick": Quick(options=options)},
        {"variants": {"a": Variant(options=options)}},
        {"variants": {"a": Variant(reference=Reference(options=options))}},
    ):
        with pytest.raises(ValueError, match="is no option that a study can give"):
            StudyConfig(configs=["x.yaml"], **changes)  # type: ignore[arg-type]


def test_a_trusted_callback_runs_and_is_noted(
    tmp_path: Path, witness: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line; trust is no part of what the run is."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d"}]
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"messages": turns} for _ in range(4)])
    argv = [
        *("fit", "--model.base.name", str(model_folder), "--data.path", str(pool)),
        *("--data.cache_dir", str(tmp_path / "cache"), "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--model.lora", "null"),
        *("--outputs", str(tmp_path / "out"), "--name", "run", "--data.max_length", "64"),
        *("--trainer.callbacks", "gadget.Watcher", "--trainer.logger", "false"),
    ]
    assert "--trust_import gadget.Watcher" in fails(capsys, *argv)
    assert not witness.exists() and not (tmp_path / "out").exists()
    cli.main([*argv, "--trust_import", "gadget"])
    run = tmp_path / "out" / "run"
    assert witness.exists() and (run / "summary.json").is_file()
    assert "trusted to run code: gadget" in (run / "log.txt").read_text()
    assert "trust_import" not in (run / "config.yaml").read_text()
    cli.main([*argv, "--trust_import", "gadget.Watcher"])  # the same run, finished
    assert "finished before" in capsys.readouterr().out


def test_a_hostile_configuration_in_its_own_process(tmp_path: Path, witness: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    bomb.write_bytes(pickle.dumps(Bomb(witness)))
    value = {"class_path": "torch.load", "init_args": {"f": str(bomb), "weights_only": False}}
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(tree("trainer.plugins", [value])))
    argv = ["fit", *BASE, "-c", str(tmp_path / "evil.yaml"), "--outputs", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tokenclean", *argv],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "trainer.plugins: torch.load is not" in done.stderr
    assert not witness.exists() and not (tmp_path / "out").exists()


# -- what is typed Any ----------------------------------------------------------------------------

OURS = [
    *(CleanedSFTModule, ScoringModule, TuluDataModule),
    *(BaseConfig, Speed, LoraSettings, SelectionConfig, AttributeSettings, LoopConfig, Arm),
    *(Column, evaluation.ModelChoice, StudyConfig, Variant, Reference, Quick),
]


def parts_of(hint: Any) -> set[Any]:
    """A type and all that it is made of."""
    if isinstance(hint, list):  # the arguments of a function
        return set().union(*map(parts_of, hint))
    return {hint}.union(*(parts_of(part) for part in get_args(hint)))


@pytest.mark.parametrize("owner", OURS, ids=lambda owner: owner.__name__)
def test_nothing_of_ours_takes_anything(owner: type) -> None:
    hints = get_type_hints(owner.__init__)  # type: ignore[misc]
    names = [n for n in inspect.signature(owner.__init__).parameters if n != "self"]  # type: ignore[misc]
    assert names
    for name in names:
        assert not parts_of(hints[name]) & {Any, object, type, dict, list}, f"{owner}: {name}"


def test_every_class_of_ours_is_audited() -> None:
    """Whatever dataclass a configuration can reach is among those above."""
    reached = {
        part
        for owner in OURS
        for hint in get_type_hints(getattr(owner, "__init__")).values()  # noqa: B009
        for part in parts_of(hint)
        if dataclasses.is_dataclass(part)
    }
    assert reached <= set(OURS)
    assert {t for t in parsing.allowed().values() if dataclasses.is_dataclass(t)} <= set(OURS)


def test_classes_of_others_are_given_data_alone() -> None:
    """Whatever the type of a parameter: no class, function or module reaches it."""
    tried = 0
    for path, thing in parsing.allowed().items():
        if not inspect.isclass(thing) or thing.__module__.startswith("tokenclean"):
            continue
        for name, parameter in inspect.signature(thing).parameters.items():
            group = "dict_kwargs" if parameter.kind is parameter.VAR_KEYWORD else "init_args"
            for value in ({"class_path": "torch.optim.SGD"}, os.system, torch.load, os, Bomb):
                for held in (value, [value], {"deep": {"er": value}}):
                    spec = Namespace(class_path=path, **{group: Namespace(**{name: held})})
                    with pytest.raises(ValueError, match=f"here.{group}.{name}"):
                        parsing.check(spec, "here")
                    tried += 1
            plain = {"a": [1, 2.0, "b", None, True]}
            parsing.check(Namespace(class_path=path, **{group: Namespace(**{name: plain})}))
    assert tried > 1000


# -- YAML -----------------------------------------------------------------------------------------

LAUGHS = "\n".join(
    ["a0: &a0 [ha, ha]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "counting every alias"),
        ("a: &a {<<: *a}", "lies inside"),
        ("a: &a [*a]", "lies inside"),
        ("a: " + "[" * 5000 + "]" * 5000, "50 deep"),
        ("- " * 400_000 + "x", "50 deep"),
        ("a: " + "9" * 5000, "digits"),
        ("a: 1" + ":59" * 5000, "digits"),
        ("- x\n" * 200_000, "100,000 entries"),
        ("a: " + "x" * (1 << 20), "more than 1,048,576"),
        ("a: !!python/object/apply:os.system ['touch $WITNESS']", "python/object/apply:os.system"),
        ("a: !!python/name:os.system", "python/name:os.system"),
        ("!!python/module:gadget {}", "python/module:gadget"),
        ("a: !function gadget.optimiser", "!function"),
        ("a: [", "find expected node"),
        ("a: \x00", "not allowed"),
        ("%TAG ! tag:yaml.org,2002:python/object/apply:\n---\na: !os.system [x]", "os.system"),
    ],
)
def test_yaml_that_is_more_than_data(
    text: str, message: str, tmp_path: Path, witness: Path, parse: Callable[..., Any]
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (read_yaml, lambda place: parse("-c", str(place))):
        with pytest.raises(ValueError, match=message) as refused:
            read(path)
        assert str(path) in str(refused.value)
    (tmp_path / "part.yaml").write_text(text)  # as a part of another
    with pytest.raises((ValueError, SystemExit)):
        parse("--model", str(tmp_path / "part.yaml"))
    assert not witness.exists() and "gadget" not in sys.modules


def test_a_file_of_a_terabyte(tmp_path: Path, parse: Callable[..., Any]) -> None:
    path = tmp_path / "large.yaml"
    path.touch()
    os.truncate(path, 1 << 40)
    for read in (read_yaml, lambda place: parse("-c", str(place))):
        with pytest.raises(ValueError, match=r"large\.yaml"):
            read(path)


def test_what_is_bounded_is_read_as_it_is() -> None:
    shared = "base: &b {x: 1.5, y: [a, ~, true]}\nfirst: *b\nsecond: {<<: *b, x: 2}\n"
    check_yaml(shared)
    check_yaml("a: '" + "9" * 5000 + "'\nb: " + "x" * 5000)  # no numbers
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_nothing_is_put_in_for_variables(parse: Callable[..., Any]) -> None:
    for text in ("${HOME}", "$HOME", "${oc.env:HOME}", "${model.base.name}"):
        assert parse("--model.base.name", text).model.base.name == text


# -- pickles, remote code, tasks ------------------------------------------------------------------


@pytest.fixture
def pickled_model(model_folder: Path, tmp_path: Path, witness: Path) -> Path:
    """A model whose weights are a pickle that would run."""
    place = tmp_path / "pickled"
    shutil.copytree(model_folder, place)
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(witness)))
    return place


def test_a_base_that_is_a_pickle(pickled_model: Path, witness: Path) -> None:
    base = BaseConfig(str(pickled_model))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*never loaded"):
        load_config(base)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*never loaded"):
        check_base(base, load_tokenizer(base), 64)
    with pytest.raises(ValueError, match="could not be loaded"):
        Network.load(base)
    assert not witness.exists()


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder


def test_an_adapter_that_is_a_pickle(tmp_path: Path, witness: Path, model_folder: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no weights"):
        check_adapter_folder(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(witness)))
    network = Network.load(BaseConfig(str(model_folder)))
    for read in (check_adapter_folder, network.load_adapter):
        with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
            read(folder)
    with pytest.raises(ValueError, match="holds an adapter"):
        load_config(BaseConfig(str(folder)))
    save_file({"a": torch.zeros(1)}, str(folder / "adapter_model.safetensors"))
    check_adapter_folder(folder)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "gadget"})
    )
    with pytest.raises(ValueError, match="megatron_config"):
        check_adapter_folder(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}", b"PK\x03\x04"]
)
def test_a_torn_or_hostile_header(content: bytes, tmp_path: Path, model_folder: Path) -> None:
    place = tmp_path / "torn"
    shutil.copytree(model_folder, place)
    (place / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=str(place)):
        Network.load(BaseConfig(str(place)))
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    network = Network.load(BaseConfig(str(model_folder)))
    with pytest.raises(ValueError, match=str(folder)):
        network.load_adapter(folder)


def test_code_that_comes_with_a_model(
    model_folder: Path, tmp_path: Path, witness: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "remote"
    shutil.copytree(model_folder, place)
    (place / "evil.py").write_text(GADGET)
    for name, key, value in (
        ("config.json", "AutoConfig", "evil.Watcher"),
        ("tokenizer_config.json", "AutoTokenizer", [None, "evil.Watcher"]),
    ):
        stored = json.loads((place / name).read_text())
        stored["auto_map"] = {key: value, "AutoModelForCausalLM": "evil.Watcher"}
        if name == "config.json":
            stored["model_type"] = "of_its_own"
        else:
            stored["tokenizer_class"] = "OfItsOwn"
        (place / name).write_text(json.dumps(stored))
    base = BaseConfig(str(place))
    for load in (load_config, Network.load, load_tokenizer):
        with pytest.raises(ValueError, match=r"remote|of_its_own"):
            load(base)
    # nor at a configuration's word
    argv = ["--model.base.name", str(place), "--data.path", "none.jsonl"]
    (tmp_path / "remote.yaml").write_text("model: {base: {trust_remote_code: true}}\n")
    for more in (["-c", str(tmp_path / "remote.yaml")], ["--model.base.trust_remote_code", "true"]):
        error = fails(capsys, "score", *argv, *more)
        assert "trust_remote_code" in error and "--trust_import transformers_modules" in error
    assert not witness.exists()


def test_a_run_cannot_ask_for_remote_code(tmp_path: Path) -> None:
    stored = {"model": {"base": {"name": "x", "trust_remote_code": True}}}
    with pytest.raises(ValueError, match="--trust_import transformers_modules"):
        evaluation._base_of(stored, "run")
    with trusting(["--trust_import", "transformers_modules"]):
        assert evaluation._base_of(stored, "run").trust_remote_code


def test_attention_code_from_the_hub(tmp_path: Path, model_folder: Path) -> None:
    place = tmp_path / "kernel"
    shutil.copytree(model_folder, place)
    stored = json.loads((place / "config.json").read_text())
    stored["attn_implementation"] = "someone/kernel"
    (place / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="someone/kernel"):
        load_config(BaseConfig(str(place)))


def test_task_files_of_the_users_own(
    tmp_path: Path, witness: Path, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    evil = tmp_path / "evil.yaml"
    evil.write_text("task: evil\ndoc_to_text: !function gadget.optimiser\n")
    for task in (str(evil), "evil.yaml", "./evil", "../evil", "a/b", ""):
        with pytest.raises(ValueError, match="no name of a task"):
            Column("a", [task])
    columns = json.dumps([{"name": "a", "tasks": ["evil"]}])
    argv = ["--base.name", str(model_folder), "--columns", columns, "--device", "cpu"]
    argv += ["--include_path", str(tmp_path), "--outputs", str(tmp_path / "out")]
    error = fails(capsys, "evaluate", *argv)
    assert "--include_path" in error and "--trust_import lm_eval.include_path" in error
    assert not witness.exists() and not (tmp_path / "out").exists()
    with trusting(["--trust_import", "lm_eval.include_path"]):
        assert Source(include_path=str(tmp_path)).include_path == str(tmp_path)


def test_a_data_set_that_is_a_script(
    tmp_path: Path, witness: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(GADGET)
    place = ["--outputs", str(tmp_path / "out"), "--data.cache_dir", str(tmp_path / "cache")]
    fails(
        capsys,
        *("score", "--model.base.name", str(model_folder)),
        *("--data.path", str(tmp_path / "script"), *place),
    )
    assert not witness.exists()


# -- names ----------------------------------------------------------------------------------------

BAD = ["../x", "..", ".", "", "/abs", "a/b", "a\\b", "a\x00b", "a\nb", ".a", "-a", "x" * 200]
BAD += ["a\u202eb", "\ud800", "run.partial-host-12"]


@pytest.mark.parametrize("name", BAD)
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="--name"):
        safe_name(name, "--name")
    full = Arm("fixed_model", "full")
    with pytest.raises(ValueError, match=r"loop\.arms"):
        LoopConfig({name: full})
    with pytest.raises(ValueError, match=r"study\.variants"):
        StudyConfig(configs=["x.yaml"], variants={name: Variant()})
    with pytest.raises(ValueError, match="--models"):
        named = {name: evaluation.ModelChoice(BaseConfig("x"))}
        evaluation._models(None, [], named, [])


@pytest.mark.parametrize("name", ["run", "keep_0.3", "llama-3.1-8b-x", "Läufe 2", "a b"])
def test_other_names_are_kept(name: str) -> None:
    assert safe_name(name, "--name") == name


@pytest.mark.parametrize("verb", ["fit", "score", "select", "clean", "evaluate", "study"])
def test_a_run_stays_inside_its_folder(
    verb: str, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "named.yaml").write_text(yaml.safe_dump({"name": "../../escaped"}))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"messages": turns}])
    trained = ["--model.base.name", str(model_folder), "--data.path", str(pool)]
    arms = ["--loop.arms", '{"full": {"schedule": "fixed_model", "rule": "full"}}']
    more = {
        "fit": trained,
        "score": trained,
        "clean": [*trained, *arms],
        "select": [],
        "evaluate": [
            "--base.name",
            str(model_folder),
            "-c",
            str(ROOT / "configs/evaluate/planted.yaml"),
        ],
        "study": ["-c", str(ROOT / "configs/study/main.yaml")],
    }[verb]
    outputs = tmp_path / "a" / "b" / "out"
    argv = [verb, *more, "--outputs", str(outputs)]
    for named in (["-c", str(tmp_path / "named.yaml")], ["--name", "../../escaped"]):
        assert "../../escaped" in fails(capsys, *argv, *named)
    assert "--name" in fails(capsys, *argv, "--name", str(tmp_path / "absolute"))
    assert not list(tmp_path.rglob("escaped*")) and not (tmp_path / "absolute").exists()
    assert not (tmp_path / "a").exists()
