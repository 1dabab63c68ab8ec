"""What is trusted, and what every word from outside must keep to.

A configuration, a run folder or a model from elsewhere may name things, and naming must not run
them. Which code a command may run besides its own is said on its command line alone, by
``--trust_import PATH``: a package, module or class by its dotted path. Names that become files
stay inside their run folder; YAML is plain data of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

OPTION = "--trust_import"
HELP = (
    f"{OPTION} PATH: also let configurations name what is in this package, module or class, which "
    "runs its code; may be repeated; never read from a configuration"
)

#: What transformers imports a model's own Python code as.
REMOTE_CODE = "transformers_modules"
#: What stands for task files of the user's own: they hold functions by name, and templates.
TASKS = "lm_eval.include_path"

#: The longest YAML file or value that is read, in characters: the longest of configs/ has 3,000.
MAX_BYTES = 1 << 20
#: The most nodes of one, with every alias counted for all that it stands for.
MAX_NODES = 100_000
#: How deep its lists and mappings may lie in one another.
MAX_DEPTH = 50
#: Characters of a number, since reading one takes time in the square of them.
_MAX_NUMBER = 400
#: Bytes of a file name, with room for what a partial file's name adds.
_MAX_NAME = 150

_trusted: list[str] = []
#: builds plain data alone; the one in C where PyYAML has it
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def trusted() -> tuple[str, ...]:
    """What the command line trusts besides what a configuration may name anyway."""
    return tuple(_trusted)


def words() -> list[str]:
    """The same, as words of a command line."""
    return [word for path in _trusted for word in (OPTION, path)]


def is_trusted(path: str) -> bool:
    """Whether the command line trusts a dotted path, or a package or module that it lies in."""
    return any(f"{path}.".startswith(f"{entry}.") for entry in _trusted)


def advice(path: str) -> str:
    """What to do about a path that is refused."""
    return f"naming it can run its code; if you trust that code, add {OPTION} {path}"


def check_remote_code(asked: Any, option: str) -> None:
    """Refuse to run a model's own Python code on a configuration's word alone.

    Raises:
        ValueError: naming the option, if that is asked for and not trusted.
    """
    if asked and not is_trusted(REMOTE_CODE):
        raise ValueError(
            f"{option}: it runs Python code that comes with the model; if you trust that code, add "
            f"{OPTION} {REMOTE_CODE}"
        )


@contextmanager
def trusting(argv: list[str]) -> Iterator[list[str]]:
    """Take ``--trust_import`` out of a command line, and trust what it names inside the block.

    Args:
        argv: words of the command line.

    Yields:
        The other words, in order.

    Raises:
        ValueError: for a value that is no dotted path.
    """
    paths, rest = _take(argv)
    for path in paths:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ValueError(
                f"{OPTION}: {path!r} is no dotted path of a package, module or class, such as "
                "my_package.my_rule"
            )
    before = list(_trusted)
    _trusted.extend(path for path in dict.fromkeys(paths) if path not in before)
    try:
        yield rest
    finally:
        _trusted[:] = before


def _take(argv: list[str]) -> tuple[list[str], list[str]]:
    paths, rest = [], []
    words = iter(argv)
    for word in words:
        if word == OPTION:
            if (value := next(words, None)) is None:
                raise ValueError(f"{OPTION}: the path is missing")
            paths.append(value)
        elif word.startswith(f"{OPTION}="):
            paths.append(word.removeprefix(f"{OPTION}="))
        else:
            rest.append(word)
    return paths, rest


# -- names ----------------------------------------------------------------------------------------


def safe_name(name: str, option: str) -> str:
    """A name that becomes a file or folder directly inside another.

    Args:
        name: the name.
        option: where it was given, for the error.

    Raises:
        ValueError: if it could lead elsewhere or cannot be shown: an empty name, one that begins
            with a dot or a dash, holds a separator or an unprintable character, is longer than
            150 bytes, or is that of a partial file.
    """
    wrong = None
    if not name:
        wrong = "it is empty"
    elif name[0] in ".-":
        wrong = f"it begins with {name[0]!r}"
    elif "/" in name or "\\" in name:
        wrong = "it holds a separator of folders"
    elif not name.isprintable():
        wrong = "it holds a character that cannot be printed"
    elif len(name.encode()) > _MAX_NAME:
        wrong = f"it is longer than {_MAX_NAME} bytes"
    elif ".partial-" in name:
        wrong = "it is that of a partial file, which is swept away"
    if wrong:
        shown = name if len(name) <= _MAX_NAME else f"{name[:40]}..."
        raise ValueError(f"{option}: {shown!r} cannot be the name of a file or folder: {wrong}")
    return name


# -- YAML -----------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, plain data.

    Raises:
        ValueError: naming the file, if it cannot be read, is no YAML, has tags that stand for
            Python objects, or exceeds the bounds of `check_yaml`.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
        check_yaml(text)
        return yaml.load(text, Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: it cannot be read: {error}") from None


class Unbounded(yaml.YAMLError):
    """YAML that is larger than it looks, or than a configuration can be."""


def check_yaml(text: str) -> None:
    """Refuse YAML that would take much memory or time, before anything is made of it.

    A few aliases of aliases stand for billions of nodes; every alias counts for all that it stands
    for. What is looked at are the events of the parser, one at a time.

    Raises:
        Unbounded: if the text has more than `MAX_BYTES`, `MAX_NODES` or `MAX_DEPTH`, a number of
            many digits, or an alias inside what it stands for.
        yaml.YAMLError: if it is no YAML.
    """
    if len(text) > MAX_BYTES:
        raise Unbounded(f"it has more than {MAX_BYTES:,} characters")
    sizes: dict[str, int] = {}
    #: the lists and mappings that are open: their anchor and nodes so far
    still_open: list[tuple[str | None, int]] = []
    seen = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            still_open.append((event.anchor, seen))
            if len(still_open) > MAX_DEPTH:
                raise Unbounded(f"lists and mappings lie more than {MAX_DEPTH} deep")
            seen += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = still_open.pop()
            if anchor is not None:
                sizes[anchor] = seen - before
        elif isinstance(event, yaml.ScalarEvent):
            number = event.implicit[0] and event.value[:1] in tuple("+-.0123456789")
            if number and len(event.value) > _MAX_NUMBER:
                raise Unbounded(f"a number has {len(event.value):,} digits")
            if event.anchor is not None:
                sizes[event.anchor] = 1
            seen += 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in still_open):
                raise Unbounded(f"*{event.anchor} lies inside what it stands for")
            seen += sizes.get(str(event.anchor), 1)
        if seen > MAX_NODES:
            raise Unbounded(
                f"it has more than {MAX_NODES:,} entries, counting every alias for all that it "
                "stands for"
            )
