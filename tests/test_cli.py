"""The command line: help, errors before any expensive work, and each verb on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import byte_level_tokenizer, conversation, tiny_llama, write_jsonl
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import tokenclean
from tokenclean import cli, commands
from tokenclean.data.datamodule import CPU_BUDGET
from tokenclean.interrupts import Stopped
from tokenclean.models import Network

ROOT = Path(__file__).parent.parent


def call(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tokenclean", *args],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from tokenclean.cli import main; main(['--help']); main(['--version']); "
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in cli.VERBS)
    assert tokenclean.__version__ in done.stdout


def test_module_and_console_script_are_the_same() -> None:
    script = Path(sys.executable).parent / "tokenclean"
    for args in (["--help"], ["--version"]):
        one = subprocess.run([script, *args], capture_output=True, text=True, check=True)
        assert one.stdout == call(*args).stdout


def test_unknown_verb() -> None:
    done = call("train")
    assert done.returncode == 2
    assert "unknown verb 'train'" in done.stderr and "clean" in done.stderr


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    option = {
        **dict.fromkeys(("fit", "score"), "--data.path"),
        **dict.fromkeys(("select", "clean"), "--selection.keep"),
        "evaluate": "--against",
        "report": "--samples",
        "show": "--losses",
        "export": "--push_to_hub",
        "noise": "--alignment",
        "study": "--study.seeds",
        "results": "--reports",
    }
    assert option[verb] in capsys.readouterr().out


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr(Network, "load", refuse)


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run the command line in this process; returns what it printed when it refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("swallowed", "code"),
    [(Stopped("SIGTERM"), 143), (SystemExit(1), 130), (KeyboardInterrupt(), 130)],
)
def test_a_signal_never_looks_like_success(
    swallowed: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(_: list[str]) -> None:
        raise swallowed

    monkeypatch.setattr(commands, "fit", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit"])
    assert stop.value.code == code
    assert "goes on where it stopped" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "study", "report"])
def test_what_runs_in_one_process_is_refused_in_several(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in fails(capsys, verb, "--help")


@pytest.mark.slow
def test_sigterm_in_the_middle_of_training(tmp_path: Path, model_folder: Path) -> None:
    """A real process, a real signal: not success, and the same command finishes the run."""
    rows = [conversation(f"Say {i}.", f"It is {i}.", id=f"s{i}") for i in range(400)]
    data = write_jsonl(tmp_path / "pool.jsonl", rows)
    command = [
        *(sys.executable, "-m", "tokenclean", "fit", "--model.base.name", str(model_folder)),
        *("--data.path", str(data), "--data.max_length", "64", "--data.batch_size", "1"),
        *("--data.cache_dir", str(tmp_path / "cache"), "--outputs", str(tmp_path)),
        *("--name", "run", "--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while not list(tmp_path.glob("run/tensorboard/events*")) and time.monotonic() - started < 120:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "goes on where it stopped" in error
    assert not (tmp_path / "run" / "adapter").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("no_model")
class TestErrorsBeforeAnyModelLoads:
    @pytest.fixture
    def common(self, tmp_path: Path, model_folder: Path, pool_file: Path) -> list[str]:
        return [
            *("--model.base.name", str(model_folder), "--data.path", str(pool_file)),
            *("--outputs", str(tmp_path / "out"), "--data.cache_dir", str(tmp_path / "cache")),
            *("--data.max_length", "128", "--trainer.enable_progress_bar", "false"),
        ]

    @pytest.fixture
    def arms(self) -> list[str]:
        return ["--loop.arms", '{"s": {"schedule": "self_evolving"}}']

    @pytest.mark.parametrize("verb", ["clean", "select"])
    @pytest.mark.parametrize("keep", ["0", "1.5", "-0.2", "nan"])
    def test_keep(
        self, verb: str, keep: str, common: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = common if verb == "clean" else []
        assert "keep" in fails(capsys, verb, *options, "--selection.keep", keep)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--selection.scope", "corpus"], ["selection.scope", "corpus"]),
            (["--selection.rule", "best"], ["selection.rule", "best"]),
            (["--data.path", "/no/such/file.jsonl"], ["data.path", "/no/such/file.jsonl"]),
            (["--data.path", "nowhere.jsonl"], ["data.path", "nowhere.jsonl"]),
            (["--data.path", "nobody/no_such_data"], ["data.path", "nobody/no_such_data"]),
            (["--model.base.name", "nobody/no_model"], ["model.base.name", "nobody/no_model"]),
            (["--data.test_path", "no.jsonl"], ["data.test_path", "no.jsonl"]),
            (["--model.base.name", "/no/model"], ["model.base.name", "/no/model"]),
            (["--model.base.tokenizer", "/no/tok"], ["model.base.tokenizer", "/no/tok"]),
            (["--model.lora.r", "0"], ["lora.r"]),
            (["--data.max_length", "4096"], ["data.max_length", "2048"]),
            (["--data.subsets", "0"], ["data.subsets"]),
            (["--data.subsets", "1"], ["data.subsets"]),
            (["--data.subsets", "41"], ["data.subsets", "40"]),
            (["--data.subset", "7"], ["data.subset"]),
            (["--data.order", "stars"], ["stars", "pool.jsonl:1"]),
            (["--data.batch_size", "0"], ["data.batch_size"]),
            (["--data.validation_share", "1.0"], ["data.validation_share"]),
            (["--data.validation_share", "0.0001"], ["validation"]),
            (["--model.warmup_ratio", "2"], ["model.warmup_ratio"]),
            (["--model.gradient_clip", "0"], ["model.gradient_clip"]),
            (["--model.adapters", "[/no/adapter]"], ["model.adapters", "/no/adapter"]),
            (["--model.base.load_in_4bit", "true"], ["model.base.load_in_4bit"]),
            (["--no_such_option", "1"], ["no_such_option"]),
            (["--loop.arms", '{"x": {"schedule": "often"}}'], ["loop.arms", "often"]),
            (
                ["--trainer.accumulate_grad_batches", "4"],
                ["accumulate_grad_batches", "token_budget"],
            ),
            (["--trainer.gradient_clip_val", "1.0"], ["model.gradient_clip"]),
            (["--trainer.devices", "2"], ["trainer.devices"]),
            (["--loop.arms", "{}"], ["loop.arms", "configs/clean"]),
        ],
    )
    def test_clean(
        self,
        options: list[str],
        words: list[str],
        common: list[str],
        arms: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        error = fails(capsys, "clean", *common, *arms, *options)
        assert all(word in error for word in words), error

    def test_bad_lines_are_all_listed(
        self, tmp_path: Path, common: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_jsonl(
            tmp_path / "bad.jsonl", ["{broken", conversation("a", "b"), {"messages": "hi"}]
        )
        error = fails(capsys, "score", *common, "--data.path", str(path))
        assert f"{path}:1: not JSON" in error and f"{path}:3:" in error
        assert "--data.on_bad_line skip" in error

    def test_no_response_token_in_the_pool(
        self,
        tmp_path: Path,
        common: list[str],
        arms: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        rows = [{"messages": [{"role": "user", "content": "anyone there?"}]}]
        path = write_jsonl(tmp_path / "mute.jsonl", rows)
        for verb in ("fit", "score", "clean"):
            options = [*common, "--data.path", str(path), *(arms if verb == "clean" else [])]
            assert "no response token" in fails(capsys, verb, *options)

    def test_a_config_cannot_name_code_to_run(
        self, tmp_path: Path, common: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        witness = tmp_path / "ran"
        for option in ("model.optimizer", "trainer.callbacks", "trainer.logger"):
            value = {"class_path": "os.system", "init_args": {"command": f"touch {witness}"}}
            tree: dict[str, Any] = {}
            group, name = option.split(".")
            tree[group] = {name: [value] if name == "callbacks" else value}
            path = tmp_path / "evil.yaml"
            path.write_text(yaml.safe_dump(tree))
            fails(capsys, "fit", *common, "-c", str(path))
        assert not witness.exists()

    def test_two_files_that_give_arms(
        self, common: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Dictionaries of later files replace those of earlier ones: an arm would be lost."""
        files = [str(ROOT / "configs" / "clean" / f"{arm}.yaml") for arm in ("full", "random")]
        error = fails(capsys, "clean", *common, "-c", files[0], "-c", files[1])
        assert "loop.arms" in error and all(file in error for file in files)

    def test_a_refused_run_does_not_lock_its_folder(
        self, tmp_path: Path, common: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_jsonl(tmp_path / "bad.jsonl", ["{broken"])
        options = [*common, "--data.path", str(path), "--name", "once"]
        fails(capsys, "score", *options)
        error = fails(capsys, "score", *options, "--data.on_bad_line", "skip")
        assert "another configuration" not in error and "no sample at all" in error

    def test_select_without_tables(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--base and --reference" in fails(capsys, "select")
        assert "--base" in fails(capsys, "select", "--base", "/no/table")


@pytest.mark.usefixtures("no_model")
class TestEstimate:
    """Tables instead of runs: no weight is read and no run folder made."""

    @pytest.fixture
    def common(self, tmp_path: Path, model_folder: Path, pool_file: Path) -> list[str]:
        return [
            *("--model.base.name", str(model_folder), "--data.path", str(pool_file)),
            *("--outputs", str(tmp_path / "out"), "--data.cache_dir", str(tmp_path / "cache")),
            *("--data.max_length", "128", "--trainer.accelerator", "cpu", "--name", "run"),
            "--estimate",
        ]

    def rows(self, text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        header = next(i for i, row in enumerate(cells) if row[:2] == ["arm", "stage"])
        return cells[header + 1 :]

    @pytest.mark.parametrize(
        ("verb", "stage", "samples"), [("score", "score", "40"), ("fit", "train", "80")]
    )
    def test_one_stage(
        self,
        verb: str,
        stage: str,
        samples: str,
        tmp_path: Path,
        common: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        epochs = ["--trainer.max_epochs", "2"] if verb == "fit" else []
        cli.main([verb, *common, *epochs])
        printed = capsys.readouterr().out
        assert "nothing was run" in printed and f"data.token_budget: {CPU_BUDGET}" in printed
        pool, row, total = self.rows(printed)
        assert pool[:2] == ["shared", "tokenise"] and total[0] == "all"
        assert row[:4] == ["run", stage, "-", samples]
        assert all(cell != "-" for cell in row[3:])
        assert not (tmp_path / "out").exists()

    def test_limits_of_the_trainer_count(
        self, common: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        cli.main(["fit", *common, "--data.batch_size", "4", "--trainer.max_steps", "3"])
        assert self.rows(capsys.readouterr().out)[1][3] == "12"
        limits = ["--trainer.limit_train_batches", "0.2", "--trainer.max_epochs", "3"]
        cli.main(["fit", *common, "--data.batch_size", "4", *limits])
        assert self.rows(capsys.readouterr().out)[1][3] == "24"  # 3 epochs of 2 steps of 4
        error = fails(capsys, "fit", *common, "--trainer.max_epochs", "-1")
        assert "trainer.max_epochs" in error

    def test_a_whole_loop(self, common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        arms = {
            "warm": {"schedule": "warmup"},
            "fixed": {"schedule": "fixed_model"},
            "own": {"schedule": "self_evolving", "keep": 0.5},
        }
        cli.main(["clean", *common, "--loop.arms", json.dumps(arms), "--data.subsets", "3"])
        rows = self.rows(capsys.readouterr().out)
        assert [row[:4] for row in rows[1:-1]] == [
            ["shared", "score", "-", "40"],  # base
            ["shared", "select", "0", "14"],
            ["shared", "train", "0", "14"],
            ["shared", "score", "-", "40"],  # warm-up
            ["fixed", "select", "-", "40"],
            ["fixed", "train", "-", "40"],
            # each round, and between selecting and training its panel, all 13 of the last part
            *(["own", stage, "1", "13"] for stage in ("score", "select")),
            *(["shared", stage, "1", "13"] for stage in ("score", "select")),
            ["own", "train", "1", "13"],
            *(["own", stage, "2", "13"] for stage in ("score", "select")),
            *(["shared", stage, "2", "13"] for stage in ("score", "select")),
            ["own", "train", "2", "13"],
            ["own", "select", "-", "-"],  # rounds joined
            ["own", "train", "-", "-"],
        ]

    def test_arms_are_checked(self, common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        arms = json.dumps({"oracle": {"schedule": "fixed_model", "rule": "oracle"}})
        assert "planted truth" in fails(capsys, "clean", *common, "--loop.arms", arms)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Warm-up, both scores, selection and training by hand, verb by verb."""
    folder = tmp_path_factory.mktemp("stages")
    rows = [
        conversation(f"Say {i}.", f"It is {i}, of course.", id=f"s{i}", source="s")
        for i in range(30)
    ]
    data = write_jsonl(folder / "pool.jsonl", rows)
    common = [
        *("--model.base.name", str(model_folder), "--outputs", str(folder)),
        *("--data.cache_dir", str(folder / "cache"), "--data.max_length", "128"),
        *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
    ]
    training = [
        *("--data.batch_size", "4", "--trainer.max_epochs", "1"),
        *("--trainer.log_every_n_steps", "1", "--model.lora.r", "4"),
    ]
    pool = ["--data.path", str(data)]
    cli.main(["fit", *common, *pool, *training, "--data.subset", "0", "--name", "warmup"])
    cli.main(["score", *common, *pool, "--name", "base"])
    adapter = json.dumps([str(folder / "warmup" / "adapter")])
    cli.main(["score", *common, *pool, "--model.adapters", adapter, "--name", "reference"])
    tables = ["--base", str(folder / "base"), "--reference", str(folder / "reference")]
    cli.main(["select", *tables, "--outputs", str(folder), "--name", "selected"])
    cleaned = ["--data.path", str(folder / "selected" / "cleaned")]
    validation = ["--data.validation_path", str(data), "--model.save_merged", "true"]
    cli.main(["fit", *common, *cleaned, *training, *validation, "--name", "final"])
    return folder


def test_each_run_leaves_config_log_and_summary(stages: Path) -> None:
    for name in ("warmup", "base", "reference", "selected", "final"):
        assert yaml.safe_load((stages / name / "config.yaml").read_text())
        assert json.loads((stages / name / "summary.json").read_text())
        assert (stages / name / "log.txt").exists()


def test_an_estimate_does_not_make_it_another_run(stages: Path) -> None:
    assert "estimate" not in yaml.safe_load((stages / "base" / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "stage", "samples"),
    [
        ("base", "score", 30),
        ("warmup", "train", 6),  # D_0
        ("final", "train", 60),  # and once through the validation pool
    ],
)
def test_a_verbs_costs(name: str, stage: str, samples: int, stages: Path) -> None:
    rows = json.loads((stages / name / "costs.json").read_text())["rows"]
    # the pool was made by the first call that needed it, and never again
    made = [row["stage"] for row in rows] == ["tokenise", stage]
    assert made == (name == "warmup")
    row = rows[-1]
    assert (row["arm"], row["stage"], row["round"]) == (name, stage, None)
    assert row["samples"] == samples
    summary = json.loads((stages / name / "summary.json").read_text())
    targets = summary["kept_tokens"] if stage == "train" else summary["response_tokens"]
    validation = json.loads((stages / "base" / "summary.json").read_text())["response_tokens"]
    assert row["targets"] == targets + (validation if name == "final" else 0)
    folder = stages / name / ("scores" if stage == "score" else "adapter")
    # the adapter with its checkpoint and, in `final`, the merged model
    least = sum(path.stat().st_size for path in folder.iterdir())
    assert row["disk"] == least if stage == "score" else row["disk"] > least
    assert row["flops"] > 0 and row["peak_memory"] > 0
    assert row["tokens"] >= row["targets"]
    assert 0.0 <= row["model_seconds"] <= row["seconds"] <= summary["wall_seconds"] + 0.01


def test_selected_pool_on_disk(stages: Path) -> None:
    table = pq.read_table(stages / "selected" / "cleaned" / "data.parquet")
    rows = table.to_pylist()
    total = sum(sum(r["response_mask"]) for r in rows)
    assert sum(x != -100 for r in rows for x in r["labels"]) == int(total * 0.6)
    summary = json.loads((stages / "selected" / "summary.json").read_text())
    assert summary["rows_seen_by_reference"] == 6  # D_0: a fifth of 30


def test_trained_adapter_and_merged_model_agree(stages: Path, model_folder: Path) -> None:
    import torch

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, stages / "final" / "adapter")
        with_adapter = adapted.eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(stages / "final" / "merged")
        alone = merged(input_ids=ids).logits
    torch.testing.assert_close(alone, with_adapter, atol=1e-4, rtol=1e-4)
    assert (with_adapter - plain).abs().max() > 1e-3


def test_tensorboard_scalars(stages: Path) -> None:
    events = EventAccumulator(str(stages / "final" / "tensorboard"))
    events.Reload()
    for tag in (
        "train/loss",
        "train/learning_rate",
        "train/gradient_norm",
        "train/kept_share",
        "train/tokens_per_second",
        "train/kept_tokens_seen",
        "validation/loss",
    ):
        assert events.Scalars(tag), tag
    assert len(events.Scalars("train/loss")) == 8  # 30 samples by fours
    seen = [e.value for e in events.Scalars("train/kept_tokens_seen")]
    summary = json.loads((stages / "final" / "summary.json").read_text())
    assert seen[-1] == summary["kept_tokens"]


def test_a_reference_with_another_vocabulary_is_refused(
    stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cleaned pool does not go with a model whose tokenizer made other ids."""
    tokenizer = byte_level_tokenizer(bos=False)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pool = str(stages / "selected" / "cleaned")
    error = fails(
        *(capsys, "fit", "--model.base.name", str(tmp_path), "--data.path", pool),
        *("--outputs", str(tmp_path / "out")),
    )
    assert "another tokenizer" in error and error.count("fingerprint") == 1


def test_the_same_table_twice_is_refused(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = ["--base", str(stages / "base"), "--reference", str(stages / "base")]
    error = fails(capsys, "select", *tables, "--outputs", str(stages), "--name", "twice")
    assert "every score would be zero" in error


def test_swapped_tables_are_refused(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = ["--base", str(stages / "reference"), "--reference", str(stages / "base")]
    error = fails(capsys, "select", *tables, "--outputs", str(stages), "--name", "swapped")
    assert "look swapped" in error


def test_a_run_folder_stands_for_what_it_holds(stages: Path, model_folder: Path) -> None:
    """`outputs/selected` for its cleaned pool, `outputs/warmup` for its adapter."""
    base = ["--model.base.name", str(model_folder), "--outputs", str(stages)]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    adapter = ["--model.adapters", str(stages / "warmup"), "--trainer.max_steps", "1"]
    data = ["--data.path", str(stages / "selected"), "--data.cache_dir", str(stages / "cache")]
    cli.main(["fit", *base, *quiet, *adapter, *data, "--name", "on-top"])
    config = json.loads((stages / "on-top" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 + 64  # the warm-up's and the default


def test_weight_files_are_as_readable_as_the_rest(stages: Path) -> None:
    folder = stages / "final" / "adapter"
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_a_finished_run_is_not_repeated(
    stages: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (stages / "base" / "scores" / "part-00000.arrow").stat().st_mtime_ns
    started = time.time_ns()
    cli.main(
        [
            *("score", "--model.base.name", str(model_folder), "--outputs", str(stages)),
            *("--data.cache_dir", str(stages / "cache"), "--data.max_length", "128"),
            *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
            *("--data.path", str(stages / "pool.jsonl"), "--name", "base"),
        ]
    )
    assert "finished before" in capsys.readouterr().out
    after = (stages / "base" / "scores" / "part-00000.arrow").stat().st_mtime_ns
    assert before == after < started
