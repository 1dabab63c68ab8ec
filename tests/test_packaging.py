"""What others get to see of the package: its wheel, its citation, the pages of its modules."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import tokenclean  # noqa: E402
from scripts.api import main, write_pages  # noqa: E402


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the package: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    # compiled files, too, as they lie in any checkout
    shutil.copytree(ROOT / "tokenclean", folder / "tokenclean")
    compiled = folder / "tokenclean" / "evaluation" / "tasks" / "planted" / "__pycache__"
    compiled.mkdir(exist_ok=True)
    (compiled / "utils.cpython-311.pyc").touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (folder / "dist").iterdir()
    assert made.name == f"tokenclean-{tokenclean.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(made)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tree = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tokenclean").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {n for n in wheel.namelist() if ".dist-info/" not in n} == tree
    for needed in (
        "tokenclean/py.typed",
        "tokenclean/data/planted_base/model.safetensors",
        "tokenclean/evaluation/tasks/planted/_reply_yaml",
        "tokenclean/scoring/experts/maths.txt",
        "tokenclean/selection/rules/token_cleaning.py",
        "tokenclean/training/weighting/dft.py",
    ):
        assert needed in tree


def test_what_the_wheel_says_about_itself(wheel: zipfile.ZipFile) -> None:
    info = f"tokenclean-{tokenclean.__version__}.dist-info"
    facts = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Requires-Python"] == ">=3.11"
    needed = [line for line in facts.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == len(project()["dependencies"])
    assert str(facts.get_payload()).startswith("# tokenclean\n")
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "tokenclean = tokenclean.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "wheel.sh"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "works outside of the checkout" in done.stdout
    assert [p.suffix for p in (tmp_path / "out").iterdir()] == [".whl"]


def test_the_citation() -> None:
    """By the rules of the Citation File Format 1.2.0, as far as they matter here."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["message"] and found["title"] and found["abstract"]
    assert found["authors"] == [{"name": "The tokenclean developers"}]
    assert str(found["version"]) == tokenclean.__version__
    assert found["license"] == project()["license"]
    (paper,) = found["references"]
    assert paper["type"] == "conference-paper" and paper["year"] == 2025
    names = [f"{a['given-names']} {a['family-names']}" for a in paper["authors"]]
    who = "Jinlong Pang, Na Di, Zhaowei Zhu, Jiaheng Wei, Hao Cheng, Chen Qian, Yang Liu"
    assert ", ".join(names) == who
    assert paper["identifiers"][0]["value"] == "arXiv:2502.01968"
    assert paper["url"].endswith("/2502.01968")


# -- pages ----------------------------------------------------------------------------------------


def test_pages_of_modules(tmp_path: Path) -> None:
    """Docstrings become text; the same pages every time."""
    names = [
        *("tokenclean.data.pretokenised", "tokenclean.loss", "tokenclean.data.cleaned"),
        *("tokenclean.data.pool", "tokenclean.evaluation.benchmarks"),
    ]
    for out in ("one", "two"):
        write_pages(tmp_path / out, names)
    pages = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert {Path(f"{name.replace('.', '/')}.html") for name in names} < pages
    for page in pages:
        assert (tmp_path / "one" / page).read_bytes() == (tmp_path / "two" / page).read_bytes()
    text = (tmp_path / "one" / "tokenclean" / "data" / "pretokenised.html").read_text()
    assert "<code>input_ids</code>" in text and "<h6" in text
    assert "<strong>input_ids:</strong>" in text  # an attribute, by itself
    text = (tmp_path / "one" / "tokenclean" / "data" / "cleaned.html").read_text()
    assert re.search(r"<code>=+.*^labels +list&lt;int32&gt; .*=+\n</code>", text, re.S | re.M)
    text = (tmp_path / "one" / "tokenclean" / "data" / "pool.html").read_text()
    assert "<code>response_mask</code> list&lt;bool>," in text
    for found in (tmp_path / "one").rglob("*.*"):
        assert str(ROOT) not in found.read_text()
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_type_that_cannot_be_resolved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_module.py").write_text('def f(x: "Nothing") -> None:\n    """."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserWarning, match="Nothing"):
        write_pages(tmp_path / "out", ["odd_module"])
    assert not (tmp_path / "out").exists()


def test_pages_replace_nothing_but_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small_module.py").write_text('"""A word."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    write_pages(out, ["small_module"])  # an empty folder is nobody's
    (out / "old.html").touch()
    write_pages(out, ["small_module"])
    assert "A word" in (out / "small_module.html").read_text() and not (out / "old.html").exists()
    for name in ("index.html", "search.js"):
        shutil.copytree(out, tmp_path / "other")
        (tmp_path / "other" / name).unlink()
        with pytest.raises(
            ValueError, match=rf"^--out: {tmp_path / 'other'} is no folder of pages"
        ):
            write_pages(tmp_path / "other", ["small_module"])
        assert (tmp_path / "other" / "small_module.html").is_file()
        shutil.rmtree(tmp_path / "other")
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    with pytest.raises(SystemExit, match=r"^error: --out: .*file is no folder of pages"):
        main(["--out", str(file), "small_module"])
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_pages_of_the_whole_package(tmp_path: Path) -> None:
    write_pages(tmp_path / "api", ["tokenclean"])
    modules = {
        path.relative_to(ROOT).with_suffix(".html")
        for package in (ROOT / "tokenclean").rglob("__init__.py")
        # a package that lists what it offers has one page of that
        if "__all__" not in package.read_text(encoding="utf-8")
        for path in package.parent.glob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert len(modules) > 80 and Path("tokenclean/selection/rules/stm.html") in modules
    pages = {p.relative_to(tmp_path / "api") for p in (tmp_path / "api").rglob("*.html")}
    assert modules <= pages
