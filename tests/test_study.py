"""The study driver: which runs, with which commands, on which data; resumed, refused, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import write_results
from tokenclean import cli
from tokenclean.data.planted import PlantedSettings, Row
from tokenclean.models import trained_ids
from tokenclean.runs import SUMMARY
from tokenclean.study.config import Quick, Reference, StudyConfig, Variant
from tokenclean.study.driver import (
    plan_study,
    planted_settings,
    quick_study,
    run_study,
    shuffle_responses,
    write_data,
)

ROOT = Path(__file__).parent.parent


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_the_grid_is_seeds_times_variants(tmp_path: Path) -> None:
    study = StudyConfig(
        configs=["a.yaml", "b.yaml"],
        seeds=[3, 5],
        options={
            "trainer.max_epochs": 2,
            "selection.keep": 0.5,
            "loop.arms": {"full": {"rule": "full"}},
        },
        planted={},
        variants={
            "few": Variant(options={"selection.keep": 0.3}, value=0.3),
            "many": Variant(options={"selection.keep": 0.9}, value=0.9, warmup_of="few"),
        },
    )
    cells = plan_study(study, tmp_path)
    assert [(c.variant, c.seed, c.value) for c in cells] == [
        ("few", 3, 0.3), ("many", 3, 0.9), ("few", 5, 0.3), ("many", 5, 0.9)
    ]  # fmt: skip
    command = cells[3].command
    assert command[:4] == ["-c", "a.yaml", "-c", "b.yaml"]
    assert option(command, "seed_everything") == option(command, "data.seed") == "5"
    assert option(command, "data.path") == str(tmp_path / "data/many/seed_5/pool.jsonl")
    assert option(command, "loop.warmup") == str(tmp_path / "runs/few/seed_5/warmup")
    assert json.loads(option(command, "loop.arms")) == {"full": {"rule": "full"}}
    assert option(command, "trainer.max_epochs") == "2"
    # a variant's own options go before those of the study
    assert option(command, "selection.keep") == "0.9"
    assert option(cells[2].command, "selection.keep") == "0.3"
    assert Path(option(command, "outputs")) / option(command, "name") == cells[3].folder


def test_quick_replaces_what_it_names() -> None:
    study = StudyConfig(
        configs=["a.yaml"],
        seeds=[1, 2],
        planted={"samples": 4000, "corrupted": 0.1},
        variants={"one": Variant(), "two": Variant()},
        token_budget=9.0,
        quick=Quick(seeds=[0], planted={"samples": 10}, variants=["two"]),
    )
    small = quick_study(study)
    assert (small.seeds, list(small.variants), small.token_budget) == ([0], ["two"], None)
    assert small.planted == {"samples": 10, "corrupted": 0.1}
    study.quick.variants = ["three"]
    with pytest.raises(ValueError, match=r"study\.quick\.variants: three"):
        quick_study(study)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"configs": []}, r"study\.configs"),
        ({"seeds": []}, r"study\.seeds"),
        ({"seeds": [1, 1]}, r"study\.seeds"),
        ({"variants": {"a/b": Variant()}}, "separator of folders"),
        ({"variants": {"a": Variant(warmup_of="b"), "b": Variant()}}, r"a\.warmup_of: 'b'"),
        ({"variants": {"a": Variant(planted={"samples": 3})}}, r"study\.planted is null"),
        (
            {"variants": {"a": Variant(), "b": Variant(planted={"seed": 3}, warmup_of="a")}},
            r"b\.warmup_of: it differs from a",
        ),
        (
            {
                "variants": {
                    "a": Variant(),
                    "b": Variant(options={"loop.warmup_epochs": 3}, warmup_of="a"),
                }
            },
            r"b\.warmup_of: it differs from a",
        ),
        ({"variants": {"a": Variant(reference=Reference(shuffled=True))}}, "is null"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(bad: dict[str, Any], message: str) -> None:
    planted: dict[str, Any] = {"planted": {}} if "warmup_of: it" in message else {}
    with pytest.raises(ValueError, match=message):
        StudyConfig(**{"configs": ["a.yaml"], **planted, **bad})


def test_planted_settings_add_the_seed_and_scale_the_noise() -> None:
    asked = {
        "samples": 8,
        "seed": 1000,
        "corrupted": 0.2,
        "noise_scale": 2.0,
        "families": ["river"],
    }
    assert planted_settings(asked, 3) == PlantedSettings(
        samples=8, seed=1003, corrupted=0.4, irrelevant=0.7, boilerplate=0.6, families=("river",)
    )
    with pytest.raises(ValueError, match=r"study\.planted: colour is not one of"):
        planted_settings({"colour": "red"}, 0)


def talk(number: int, answer: str, truth: list[tuple[int, int, int, int]]) -> Row:
    return {
        "id": f"r{number}",
        "source": "s",
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": answer},
        ],
        "truth": truth,
        "noise": [],
        "quality": 5,
    }


def test_shuffled_responses_keep_questions_answers_and_their_truth() -> None:
    rows = [talk(i, f"answer {i}", [(1, 0, 6 + i % 2, 0)]) for i in range(40)]
    shuffled = shuffle_responses(rows, seed=1)
    assert [r["id"] for r in shuffled] == [r["id"] for r in rows]
    assert [r["messages"][0] for r in shuffled] == [r["messages"][0] for r in rows]
    moved = [r["messages"][1]["content"] for r in shuffled]
    assert sorted(moved) == sorted(r["messages"][1]["content"] for r in rows)
    # of 40 responses about one stays with its question by chance
    assert sum(m == r["messages"][1]["content"] for m, r in zip(moved, rows, strict=True)) < 6
    for row, answer in zip(shuffled, moved, strict=True):
        assert row["truth"] == [(1, 0, 6 + int(answer.split()[1]) % 2, 0)]
    assert shuffle_responses(rows, seed=1) == shuffled != shuffle_responses(rows, seed=2)


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    study = StudyConfig(configs=["a.yaml"], seeds=[0, 1, 2])
    cells = plan_study(study, tmp_path)
    ran = []

    def clean(command: list[str]) -> None:
        seed = int(option(command, "seed_everything"))
        ran.append(seed)
        if seed == 1:
            raise ValueError("no such thing")
        folder = Path(option(command, "outputs")) / option(command, "name")
        folder.mkdir(parents=True)
        (folder / SUMMARY).write_text("{}")

    failed = run_study(cells, clean, clean)
    assert ran == [0, 1, 2]
    assert failed == {str(cells[1].folder): "no such thing"}
    assert [cell.finished for cell in cells] == [True, False, True]
    ran.clear()
    run_study(cells, clean, clean)
    assert ran == [1]  # what is finished is not run again


ARMS = {
    "full": {"schedule": "fixed_model", "rule": "full"},
    "fixed": {"schedule": "fixed_model", "rule": "token_cleaning"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study of two variants, one of them with another reference, and its configuration."""
    place = tmp_path_factory.mktemp("study")
    study = {
        "configs": [
            str(ROOT / "configs" / f"{name}.yaml")
            for name in ("model/planted", "data/planted", "fit/planted", "clean/planted")
        ],
        "planted": {"samples": 24, "validation": 8, "test_per_family": 2},
        "options": {
            "loop.arms": ARMS,
            "model.base.name": str(ROOT / "tokenclean" / "data" / "planted_base"),
            "trainer.max_epochs": 1,
            "loop.warmup_epochs": 1,
            "data.cache_dir": str(place / "cache"),
            "data.subsets": 2,
        },
        "variants": {
            "half": {"options": {"selection.keep": 0.5}, "value": 0.5},
            "all": {"options": {"selection.keep": 1.0}, "value": 1.0, "warmup_of": "half"},
            "placebo": {"reference": {"shuffled": True, "planted": {"seed": 9}}},
        },
        "seeds": [4],
        "reports": ["variants"],
        "token_budget": 1.0e6,
    }
    config = place / "tiny.yaml"
    config.write_text(yaml.safe_dump({"study": study}, sort_keys=False))
    cli.main(["study", "-c", str(config), "--outputs", str(place)])
    return place, config


def test_a_study_runs_its_grid(finished: tuple[Path, Path]) -> None:
    place, _ = finished
    folder = place / "tiny"
    stored = json.loads((folder / "study.json").read_text())
    assert [c["variant"] for c in stored["cells"]] == ["half", "all", "placebo"]
    for cell in stored["cells"]:
        assert (folder / cell["folder"] / "results.json").is_file()
        assert cell["failed"] is None
    runs = folder / "runs"
    # one warm-up, taken over, and none where another reference scores
    warm = runs / "all" / "seed_4" / "warmup"
    assert not warm.is_symlink()  # what is measured of it here stays here
    for part in ("cleaned", "adapter"):
        assert (warm / part).resolve() == runs / "half" / "seed_4" / "warmup" / part
    assert not (runs / "placebo" / "seed_4" / "warmup").exists()
    reference = folder / "references" / "placebo" / "seed_4"
    assert len(trained_ids(reference / "adapter")) == 24
    table = runs / "placebo" / "seed_4" / "scores" / "reference" / "manifest.json"
    assert json.loads(table.read_text())["adapters"] == [str(reference / "adapter")]
    # everything kept is FULL, whatever the scores
    result = [
        json.loads((runs / "all" / "seed_4" / "arms" / arm / "answers.json").read_text())
        for arm in ARMS
    ]
    assert result[0] == result[1]
    text = (folder / "results.md").read_text()
    assert "half" in text and "placebo" in text
    summary = json.loads((folder / SUMMARY).read_text())
    assert (summary["runs"], summary["failed"], summary["variants"]) == (3, 0, 3)
    assert summary["tokens"] > 0


def test_a_finished_study_only_prints(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, config = finished

    def refuse(argv: list[str]) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr("tokenclean.commands.clean", refuse)
    monkeypatch.setattr("tokenclean.commands.fit", refuse)
    cli.main(["study", "-c", str(config), "--outputs", str(place)])
    said = capsys.readouterr().out
    before = (place / "tiny" / "results.md").read_bytes()
    cli.main(["results", str(place / "tiny"), "--reports", "[accuracy]"])
    assert "Accuracy minus that of" in capsys.readouterr().out
    assert (place / "tiny" / "results.md").read_bytes() == before  # others go elsewhere
    assert (place / "tiny" / "more" / "results.md").is_file()
    cli.main(["results", str(place / "tiny")])
    again = capsys.readouterr().out
    assert (place / "tiny" / "results.md").read_text() in said
    assert (place / "tiny" / "results.md").read_text() in again
    run = place / "tiny" / "runs" / "half" / "seed_4"
    cli.main(["results", str(run)])
    assert (run / "results.md").read_text() in capsys.readouterr().out
    # another study reads the same runs
    over = ["--study.of", str(place / "tiny"), "--study.reports", "[accuracy]"]
    cli.main(["study", *over, "--outputs", str(place), "--name", "other"])
    assert json.loads((place / "other" / SUMMARY).read_text())["runs"] == 3
    assert (place / "other" / "results.md").is_file()
    assert not (place / "other" / "runs").exists()


def test_results_of_all_studies_become_one_file(finished: tuple[Path, Path]) -> None:
    place, _ = finished
    benchmarks = place / "tiny" / "evaluation" / "half"
    benchmarks.mkdir(parents=True)
    (benchmarks / "results.md").write_text("| model | ARC |\n")
    write_results.main(["--outputs", str(place), "--to", str(place / "RESULTS.md")])
    text = (place / "RESULTS.md").read_text()
    assert "#### Benchmarks, half\n\n| model | ARC |" in text
    assert "## tiny\n\n`tokenclean study -c configs/study/tiny.yaml`" in text
    assert "3 of 3 runs; seeds 4; 24 planted samples" in text
    assert "settings half, all, placebo" in text
    table = (place / "tiny" / "tables" / "variants_all.csv").read_text().splitlines()
    assert len(table) == 4
    assert text.count("| half |") == (place / "tiny" / "results.md").read_text().count("| half |")
    with pytest.raises(SystemExit, match="holds no study"):
        write_results.main(["--outputs", str(place), "--quick"])


def test_results_of_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["results", str(tmp_path)])
    assert f"{tmp_path}: no results there" in capsys.readouterr().err


def test_more_tokens_than_the_budget_are_refused(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place, config = finished
    words = ["-c", str(config), "--outputs", str(place), "--name", "dear"]
    with pytest.raises(SystemExit):
        cli.main(["study", *words, "--study.token_budget", "100"])
    assert "study.token_budget: the runs would compute" in capsys.readouterr().err
    assert not (place / "dear" / "runs").exists()
    with pytest.raises(SystemExit):
        cli.main(["study", *words, "--study.against", "fulll"])
    assert "study.against: 'fulll' is not an arm of half" in capsys.readouterr().err
    cli.main(["study", *words, "--estimate"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith(("| half", "| all"))]
    assert len(lines) == 3  # two variants and the sum
    assert not (place / "dear" / "runs").exists()
    # asking what another study would cost leaves the finished one alone
    pool = place / "tiny" / "data" / "half" / "seed_4" / "pool.jsonl"
    before = pool.read_bytes()
    other = ["-c", str(config), "--outputs", str(place), "--study.planted", '{"samples": 30}']
    cli.main(["study", *other, "--estimate"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["study", *other])
    assert "holds a run of another configuration" in capsys.readouterr().err
    assert pool.read_bytes() == before


def test_a_warm_up_on_other_samples_is_refused(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = finished
    cell = json.loads((place / "tiny" / "study.json").read_text())["cells"][1]
    command = cell["command"][1:]
    command[command.index("--data.seed") + 1] = "5"  # another split: another D_0
    command[command.index("--name") + 1] = "other_split"
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "was trained on other samples" in capsys.readouterr().err
    assert not (place / "tiny" / "runs" / "all" / "other_split" / "base").exists()
    bad = ["--loop.reference", str(place / "nowhere")]
    command = [*cell["command"][1:], "--name", "no_reference", *bad]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "nowhere" in capsys.readouterr().err


def test_data_are_written_once(tmp_path: Path) -> None:
    study = StudyConfig(configs=["a.yaml"], seeds=[0], planted={"samples": 8, "validation": 0})
    write_data(study, tmp_path)
    pool = tmp_path / "data" / "main" / "seed_0" / "pool.jsonl"
    before = pool.stat().st_mtime_ns
    write_data(study, tmp_path)
    assert pool.stat().st_mtime_ns == before
    study.planted = {"samples": 9, "validation": 0}
    write_data(study, tmp_path)
    assert len(pool.read_text().splitlines()) == 9
