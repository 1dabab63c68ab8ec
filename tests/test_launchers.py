"""The launchers for torchrun and SLURM, dry: what they start, pass on, requeue and end with.

SLURM is played by this file: ``#SBATCH`` lines become the variables that a job sees, the script
runs as a copy in a spool folder, `srun` starts tasks and passes signals on as the real one does.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import conversation, write_jsonl
from lightning.fabric.plugins.environments import SLURMEnvironment

from scripts import scaling_table
from tokenclean import cli
from tokenclean.interrupts import EXIT_CODE

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "scripts" / "tokenclean.sbatch"
TORCHRUN = ROOT / "scripts" / "torchrun.sh"
LIMIT_S = 60.0

#: Starts what follows its options as tasks, passes SIGUSR1 on, ends with the highest code.
SRUN = """
import os, signal, subprocess, sys
folder = os.environ["FAKE"]
open(folder + "/srun.args", "a").write(repr(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
def forward(number, frame):
    open(folder + "/srun.signals", "a").write(signal.Signals(number).name + "\\n")
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
for rank in range(count):
    own = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
    tasks.append(subprocess.Popen(words, env={**os.environ, **own}))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
#: Plays `python -m tokenclean` or torchrun: ends with $CODE, or waits to be told.
PROGRAM = """
import os, signal, sys, time
folder, code = os.environ["FAKE"], os.environ["CODE"]
if code == "wait":
    def told(number, frame):
        open(folder + "/program.signals", "a").write(signal.Signals(number).name + "\\n")
        time.sleep(0.3)  # the rest of a shard
        sys.exit(int(os.environ.get("TOLD", "143")))
    signal.signal(signal.SIGUSR1, told)
    signal.signal(signal.SIGINT, told)
open(folder + "/program.cwd", "w").write(os.getcwd())
open(folder + "/program.args", "a").write("\\n".join(sys.argv[1:]) + "\\n\\n")
if code == "wait":
    time.sleep(40)
    sys.exit(99)
sys.exit(int(code))
"""
SCONTROL = """
import os, sys
open(os.environ["FAKE"] + "/scontrol.args", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


class Machine:
    """A folder of played programs, and what they noted."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        for name, text in {
            "bin/srun": SRUN,
            "bin/scontrol": SCONTROL,
            "bin/torchrun": PROGRAM,
            "venv/bin/python": PROGRAM,
        }.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(f"#!{sys.executable}{text}")
            path.chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "TOKENCLEAN_VENV": str(folder / "venv"),
            "FAKE": str(folder),
        }

    def noted(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.is_file() else ""

    def commands(self, name: str = "program.args") -> list[list[str]]:
        return [text.split("\n") for text in self.noted(name).split("\n\n") if text]

    def start(self, script: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *words],
            env={**self.environment, **variables},
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def submit(self, *words: str, job: dict[str, str] | None = None, **more: str) -> Any:
        """Run the job script as SLURM would; ``job`` replaces directives."""
        spool = self.folder / "spool" / "slurm_script"
        spool.parent.mkdir(exist_ok=True)
        shutil.copy(SBATCH, spool)
        return self.start(spool, *words, **slurm_variables(job), **more)

    def told(self, process: subprocess.Popen[str], number: signal.Signals, tasks: int = 1) -> int:
        """Send a signal once the program runs; the code that the script ends with."""
        until = time.monotonic() + LIMIT_S
        while len(self.commands()) < tasks and time.monotonic() < until:
            time.sleep(0.02)
        if number == signal.SIGINT:  # Ctrl-C goes to all of a group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        return process.wait(LIMIT_S)


def directives() -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SBATCH.read_text(), flags=re.M)
    return dict(found)


def slurm_variables(changes: dict[str, str] | None = None) -> dict[str, str]:
    """What a job finds in its environment, by sbatch's manual."""
    asked = {**directives(), **(changes or {})}
    tasks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": asked["job-name"],
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NNODES": asked["nodes"],
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"],
        "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
    }


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


ONE = {"ntasks-per-node": "1"}


@pytest.mark.parametrize("script", [SBATCH, TORCHRUN], ids=lambda path: path.name)
def test_a_script_is_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_job_may_be_requeued_and_is_told_before_its_time_is_over() -> None:
    asked = directives()
    assert asked["signal"] == "B:USR1@120"  # to the script alone, which passes it on
    assert "requeue" in asked
    assert asked["open-mode"] == "append"  # or the next start would empty the log
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["job-name"] not in ("bash", "interactive")


def test_out_of_time_a_job_goes_back_into_the_queue_until_it_is_done(machine: Machine) -> None:
    words = ("score", "--name", "a run")
    job = machine.submit(*words, job=ONE, CODE="wait")
    assert machine.told(job, signal.SIGUSR1) == EXIT_CODE
    assert machine.noted("program.signals") == "SIGUSR1\n"
    assert machine.noted("scontrol.args") == "requeue 4711\n"
    assert machine.submit(*words, job=ONE, CODE="0").wait(LIMIT_S) == 0
    assert machine.noted("scontrol.args") == "requeue 4711\n"
    first, second = machine.commands()
    assert first == second
    assert first[:5] == ["-m", "tokenclean", "score", "--trainer.strategy", "ddp"]
    assert first[5:7] == ["--name", "a run"]
    assert machine.noted("program.cwd") == str(ROOT)


@pytest.mark.parametrize("code", ["0", "1", "2", "137", "143"])
def test_what_ends_by_itself_is_not_requeued(machine: Machine, code: str) -> None:
    assert machine.submit("clean", job=ONE, CODE=code).wait(LIMIT_S) == int(code)
    assert machine.noted("scontrol.args") == ""


@pytest.mark.parametrize(("told", "requeued"), [("0", False), ("2", False), ("138", True)])
def test_told_in_its_last_or_first_moment(machine: Machine, told: str, requeued: bool) -> None:
    job = machine.submit("score", job=ONE, CODE="wait", TOLD=told)
    assert machine.told(job, signal.SIGUSR1) == int(told)
    assert machine.noted("scontrol.args") == ("requeue 4711\n" if requeued else "")


def test_cancelled_a_job_stops_and_stays_out_of_the_queue(machine: Machine) -> None:
    job = machine.submit("score", job=ONE, CODE="wait")
    assert machine.told(job, signal.SIGTERM) == EXIT_CODE
    # srun would kill its tasks at a SIGTERM
    assert machine.noted("srun.signals") == "SIGUSR1\n"
    assert machine.noted("scontrol.args") == ""


def test_every_task_is_told(machine: Machine) -> None:
    job = machine.submit("score", job={"ntasks-per-node": "3"}, CODE="wait")
    assert machine.told(job, signal.SIGUSR1, tasks=3) == EXIT_CODE
    assert machine.noted("program.signals") == "SIGUSR1\n" * 3


def test_one_failed_task_ends_all(machine: Machine) -> None:
    machine.submit("score", job=ONE, CODE="0").wait(LIMIT_S)
    assert "'--kill-on-bad-exit=1', '--cpus-per-task=8'" in machine.noted("srun.args")


def test_a_verb_must_be_given(machine: Machine) -> None:
    for job in (machine.submit(CODE="0"), machine.start(TORCHRUN, CODE="0")):
        output, _ = job.communicate(timeout=LIMIT_S)
        assert job.returncode != 0
        assert "usage:" in output


def test_torchrun_stops_and_says_so(machine: Machine) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        (machine.folder / "program.args").unlink(missing_ok=True)
        # torchrun ends with 1 whatever its processes end with
        run = machine.start(TORCHRUN, "score", PROCESSES="2", CODE="wait", TOLD="1")
        assert machine.told(run, number) == EXIT_CODE
    assert machine.noted("program.signals") == "SIGUSR1\n" * 3


@pytest.mark.parametrize("code", ["0", "1"])
def test_torchrun_passes_codes_on(machine: Machine, code: str) -> None:
    run = machine.start(TORCHRUN, "score", PROCESSES="2", CODE=code)
    assert run.wait(LIMIT_S) == int(code)


def test_torchrun_on_several_machines(machine: Machine) -> None:
    machine.start(TORCHRUN, "fit", PROCESSES="4", MACHINES="2", MAIN="first:29500", CODE="0").wait(
        LIMIT_S
    )
    (command,) = machine.commands()
    text = " ".join(command)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint first:29500" in text
    assert text.endswith("--trainer.devices 4 --trainer.num_nodes 2")
    run = machine.start(TORCHRUN, "fit", PROCESSES="4", MACHINES="2", CODE="0")
    assert run.wait(LIMIT_S) != 0
    assert len(machine.commands()) == 1


# -- what is started is understood ------------------------------------------------------------


@pytest.fixture
def options(model_folder: Path, tmp_path: Path) -> list[str]:
    rows = [conversation(f"What is {i}?", f"It is {i}.", id=str(i)) for i in range(8)]
    data = write_jsonl(tmp_path / "pool.jsonl", rows)
    places = ["--outputs", str(tmp_path / "out"), "--data.cache_dir", str(tmp_path / "cache")]
    return ["--model.base.name", str(model_folder), "--data.path", str(data), *places]


def settings(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The trainer's settings that the program's own parser reads from what was started."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*command[command.index("tokenclean") + 1 :], "--print_config"])
    assert ended.value.code == 0
    read: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["trainer"]
    return read


def test_jobs_are_parsed_and_fit_what_lightning_demands_of_slurm(
    machine: Machine,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = {"ntasks-per-node": "2", "nodes": "3"}
    machine.submit("score", *options, job=job, CODE="0").wait(LIMIT_S)
    read = settings(machine.commands()[0], capsys)
    assert (read["devices"], read["num_nodes"], read["strategy"]) == ("2", 3, "ddp")
    for name, value in slurm_variables(job).items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    SLURMEnvironment().validate_settings(int(read["devices"]), read["num_nodes"])
    with pytest.raises(ValueError, match="ntasks-per-node"):
        SLURMEnvironment().validate_settings(4, 3)


def test_runs_are_parsed_and_take_another_strategy(
    machine: Machine, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*options, "--trainer.strategy", "fsdp2")
    machine.start(TORCHRUN, "fit", *more, PROCESSES="2", CODE="0").wait(LIMIT_S)
    read = settings(machine.commands()[0], capsys)
    assert (read["devices"], read["num_nodes"], read["strategy"]) == ("2", 1, "fsdp2")


# -- for real ---------------------------------------------------------------------------------


def real(machine: Machine) -> None:
    """The interpreter and torchrun of these tests instead of played ones."""
    environment = Path(sys.executable).parent
    (machine.bin / "torchrun").unlink()
    (machine.bin / "torchrun").symlink_to(environment / "torchrun")
    machine.environment |= {
        "TOKENCLEAN_VENV": str(environment.parent),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CODE": "0",
    }


@pytest.mark.slow
def test_torchrun_scores(machine: Machine, options: list[str]) -> None:
    real(machine)
    run = machine.start(TORCHRUN, "score", *options, "--name", "base", PROCESSES="2")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert (machine.folder / "out" / "base" / "scores" / "manifest.json").is_file()
    assert not (machine.folder / "out" / "base" / "scores.shards").exists()


@pytest.mark.slow
def test_a_job_out_of_time_goes_on_from_its_shards(machine: Machine, model_folder: Path) -> None:
    real(machine)
    rows = [conversation(f"What is {i}?", "It is 1. " * 60, id=str(i)) for i in range(800)]
    data = write_jsonl(machine.folder / "many.jsonl", rows)
    out = machine.folder / "out"
    words = [
        *("score", "--model.base.name", str(model_folder), "--data.path", str(data)),
        *("--outputs", str(out), "--data.cache_dir", str(machine.folder / "cache")),
        *("--data.token_budget", "500"),
    ]
    two = {"ntasks-per-node": "2"}
    job = machine.submit(*words, "--name", "stopped", job=two)
    shards = out / "stopped" / "scores.shards"
    until = time.monotonic() + 300
    while len(list(shards.glob("shard-*.arrows"))) < 2 and time.monotonic() < until:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == EXIT_CODE, output
    assert machine.noted("scontrol.args") == "requeue 4711\n"
    assert list(shards.glob("shard-*.arrows"))
    assert not (out / "stopped" / "scores").exists()

    again = machine.submit(*words, "--name", "stopped", job=two)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "shards are there already" in output
    shutil.rmtree(machine.folder / "cache" / "scores")
    whole = machine.submit(*words, "--name", "whole", job=two)
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    parts = sorted(path.name for path in (out / "whole" / "scores").glob("*.arrow"))
    assert parts
    for name in parts:
        one, other = out / "stopped" / "scores" / name, out / "whole" / "scores" / name
        assert one.read_bytes() == other.read_bytes()


# -- SCALING.md -------------------------------------------------------------------------------


def test_the_page_on_scaling_holds_what_its_formulas_give() -> None:
    text = (ROOT / "SCALING.md").read_text(encoding="utf-8")
    assert scaling_table.table() in text
    assert scaling_table.limits_table() in text


def test_a_pass_of_the_paper_by_hand() -> None:
    """Llama 3.2 3B: 28 layers, hidden 3072, 24 and 8 heads of 128, MLP 8192, tied head."""
    paper = scaling_table.CASES[0]
    attention = 3072 * (3072 + 1024 + 1024) + 3072 * 3072
    weights = 28 * (attention + 3 * 3072 * 8192)
    per_token = 2 * weights + 4 * 28 * 3072 * 361 + 2 * 3072 * 128_256 * 0.67
    hours = per_token * 24.1e6 / (0.6 * 989e12) / 3600
    assert scaling_table.scoring_hours(paper) == pytest.approx(hours, rel=1e-3)


def test_limits_by_hand() -> None:
    found = [tokens for _, tokens in scaling_table.limits()]
    assert found == sorted(found)
    # 64,867 files of 64 times 1,024 rows of 482 tokens, shared by three tables
    assert found[2] == pytest.approx(64_867 * 64 * 1024 * 482 / 3)
    # two days at 4 us per token; at 125 ns per response token, two thirds; at 0.39 us, an eighth
    assert found[0] == pytest.approx(172_800 / 4e-6)
    assert found[5] == pytest.approx(172_800 / 125e-9 / 0.67)
    assert found[6] == pytest.approx(8 * 172_800 / 0.39e-6)
    # 10^12 tokens in batches of 8,192, in at most 65,536 shards
    assert scaling_table.shard_batches(scaling_table.CASES[2]) == 1_863


def test_waiting_by_hand() -> None:
    """10^9 tokens, 670 million of them responses, 7 of 8 devices waiting."""
    alone = 1e9 * 4e-6 + 0.67e9 * 1.8 * 125e-9 + 1e9 * 0.39e-6
    waiting = scaling_table.waiting_hours(scaling_table.CASES[1])
    assert waiting == pytest.approx(7 * alone / 3600)


def test_sharing_70b_by_hand() -> None:
    """Layers of two norms, 80 of them; embeddings and head of 128,256 x 8,192 stay whole."""
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672 + 2 * 8192
    whole = 2 * 128_256 * 8192 + 8192
    case = scaling_table.CASES[2]
    for split in (4, 8):
        held = 2 * (whole + layer * (80 / split + 2))
        scoring, training = scaling_table._peaks(case, split)
        # the inside of a layer and a chunk of logits besides
        assert held < scoring < held + 4e9
        assert scoring < training
    assert scaling_table.sharing(case) == 4
