"""Pages of the package's public modules, made from their docstrings by pdoc.

    python scripts/api.py [--out outputs/api] [MODULE ...]

A warning of pdoc's, of a type that it cannot resolve for one, is an error. The same code gives the
same pages. Needs `pip install 'tokenclean[docs]'`; downloads nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import shutil
import sys
import typing
import warnings
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
#: A table whose columns stand below each other between three rulers, or two.
_TABLE = re.compile(r"^(=+(?: +=+)+)\n(?:.+\n)+?\1$(?:\n(?:.+\n)+?\1$)?", re.M)
#: Code, which is left as it is, or something that looks like a tag's beginning.
_TAG = re.compile(r"(```[^`]*```|``[^`]*``|`[^`]*`|^    .*$)|<(?=[\w/!])", re.M)


def write_pages(folder: Path, names: list[str]) -> None:
    """Write a page for each module and for all below it, an index, and a search.

    Args:
        folder: made; replaced if pdoc wrote it.
        names: of modules, ``tokenclean`` for the whole package.

    Raises:
        UserWarning: pdoc's first warning.
        ValueError: if the folder holds something else.
    """
    pages = all((folder / name).is_file() for name in ("index.html", "search.js"))
    if folder.exists() and not (pages or (folder.is_dir() and not any(folder.iterdir()))):
        raise ValueError(
            f"--out: {folder} is no folder of pages, and is not replaced; name another"
        )
    import pdoc

    import tokenclean

    footer = f"tokenclean {tokenclean.__version__}"
    pdoc.render.configure(docformat="google", show_source=False, footer_text=footer)
    filters = pdoc.render.env.filters
    if "plain_to_html" not in filters:
        filters["plain_to_html"] = filters["to_html"]
    filters["to_html"] = lambda text: filters["plain_to_html"](_markdown(text))
    for name in pdoc.extract.walk_specs(names):
        _resolve_constructors(importlib.import_module(name))
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pdoc.pdoc(*names, output_directory=partial)
        for page in partial.rglob("*.*"):  # constants that are paths, as this machine has them
            page.write_bytes(page.read_bytes().replace(f"{ROOT}/".encode(), b""))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _markdown(text: str) -> str:
    """A docstring as Markdown that says the same: ``list<int32>`` is no tag, a table no prose."""
    text = _TABLE.sub(lambda table: f"```\n{table[0]}\n```", text)
    return _TAG.sub(lambda found: found[0] if found[1] else "&lt;", text)


def _resolve_constructors(module: ModuleType) -> None:
    """Resolve those types of a module's made constructors that pdoc looks for in the wrong place.

    Python makes a named tuple's in a module that does not exist, and a data class's names the types
    of inherited fields as the base's module knows them.
    """
    for found in vars(module).values():
        if not isinstance(found, type) or found.__module__ != module.__name__:
            continue
        if issubclass(found, tuple) and hasattr(found, "_fields"):
            found.__new__.__module__ = module.__name__
        elif dataclasses.is_dataclass(found):
            own, types = vars(found).get("__annotations__", {}), found.__init__.__annotations__
            inherited = types.keys() - own.keys() - {"return"}
            if inherited:
                known = typing.get_type_hints(found)
                types.update({name: known[name] for name in inherited if name in known})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", default=["tokenclean"], metavar="MODULE")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "api")
    args = parser.parse_args(argv)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings would be printed in another order in every process.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_pages(args.out, args.modules)
    except (UserWarning, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.out / 'index.html'}")


if __name__ == "__main__":
    main()
