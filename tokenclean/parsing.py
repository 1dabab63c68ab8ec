"""Parsers of options and configurations that cannot be made to run code.

A configuration may name classes, and naming a class runs it. So a parser resolves those alone that
a list holds, class by class; and what was parsed is walked once more before anything is made of it,
since a refused path may end up as a mere mapping or string under a type that takes those as well.
"""

from __future__ import annotations

import datetime
import inspect
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from tokenclean.trust import (
    HELP,
    OPTION,
    advice,
    check_remote_code,
    check_yaml,
    is_trusted,
    read_yaml,
    trusted,
)

set_parsing_settings(
    import_path_denylist=["*"],
    # Where a type takes anything, a class is refused if it is wrong and never made.
    validate_subclass_spec_in_any=True,
    instantiate_subclass_spec_in_any=False,
)
#: Every spelling of what a configuration may name -> the class or function.
_allowed: dict[str, Any] = {}
#: What jsonargparse was told to trust for the present command.
_granted: set[str] = set()

#: options that name folders, and more that become names of files where a class takes them
_FOLDERS = frozenset({"dirpath", "save_dir", "default_root_dir"})
_FILES = frozenset({"filename", "name", "version", "sub_dir", "root_dir", "log_dir"})
#: characters of a path
_PATH = 4096

_PLAIN = (bool, int, float, str, type(None), datetime.timedelta, os.PathLike)
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_REFUSED = re.compile(r"(?:([\w.]+): )?([\w.]+) is not among what a configuration may name")
_KEY = re.compile(r'Parser key "([\w.]+)"')
#: a mapping that names a class, in a string
_SPEC = re.compile(r"""(?:^|[\s{,\[])["']?class_path["']?\s*:""")


def allow(*things: Any) -> None:
    """Let configurations name these classes and functions, wherever they are imported from.

    What a class is given must be plain data: numbers, strings, lists and mappings of them.
    """
    paths = {path: thing for thing in things for path in _spellings(thing)}
    _allowed.update(paths)
    set_parsing_settings(import_path_allowlist=sorted(paths))


def allowed() -> dict[str, Any]:
    """What configurations may name, by every spelling of its path."""
    return dict(_allowed)


def _spellings(thing: Any) -> list[str]:
    """Where it is defined, and the packages above that hand it on under its own name."""
    module, name = thing.__module__, thing.__qualname__
    parts = module.split(".")
    places = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return [f"{p}.{name}" for p in places if getattr(sys.modules.get(p), name, None) is thing]


class Refusing:
    """Mixed into a parser: it resolves what is allowed or trusted alone, and says so."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("epilog", HELP)
        super().__init__(*args, **kwargs)
        _follow_trust()

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse a command line.

        Raises:
            ValueError: see `check`.
        """
        try:
            config = super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            if found := _DENIED.search(str(error)):
                _refuse("options", found[1])
            raise
        if self.exit_on_error:  # type: ignore[attr-defined]
            check(config)
        return config

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration file.

        Raises:
            ValueError: see `tokenclean.trust.read_yaml`.
        """
        if Path(path).is_file():  # a pipe can be read only once
            read_yaml(path)  # names the file, and reads no more of it than may be
        return super().parse_path(path, *args, **kwargs)  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refused paths in one line of our own; other errors as they are."""
        if self.exit_on_error:  # type: ignore[attr-defined]
            key = _KEY.search(message)
            place = key[1] if key else ""
            if found := _DENIED.search(message):
                _refuse(place, found[1])
            if found := _REFUSED.search(message):  # while a value was read
                _refuse(f"{place}.{found[1]}".strip(".") if found[1] else place, found[2])
        super().error(message, ex)  # type: ignore[misc]
        raise AssertionError("a parser's error never returns")


class Parser(Refusing, ArgumentParser):  # type: ignore[misc]
    """`ArgumentParser` of jsonargparse that refuses what is not allowed."""


def _follow_trust() -> None:
    """Tell jsonargparse what the present command trusts, and what an earlier one did no more."""
    now = set(trusted())
    gone = sorted(_granted - now - set(_allowed))
    set_parsing_settings(import_path_denylist=gone, import_path_allowlist=sorted(now))
    _granted.clear()
    _granted.update(now)


def check(value: Any, place: str = "", resolved: bool = True, confined: bool = True) -> None:
    """Refuse options that name what they may not, before anything is made of them.

    Args:
        value: what was parsed, or a part of it.
        place: its dotted option.
        resolved: whether all paths are whole; else names without a dot are left to the parser, and
            files and folders are looked at, too.
        confined: folders that are named must not lead out of the working folder.

    Raises:
        ValueError: naming option and path, for a class, function or module that is neither allowed
            nor trusted, also inside a string; and for anything but plain data that an allowed class
            is to be given.
    """
    if isinstance(value, Namespace | dict):
        parts = vars(value) if isinstance(value, Namespace) else value
        if "class_path" in parts:
            _check_class(parts, place, resolved)
            return
        for key, part in parts.items():
            within = f"{place}.{key}" if place else str(key)
            if key == "trust_remote_code":
                check_remote_code(part, within)
            if confined and not resolved:
                _check_place(key, part, within, inside=place.endswith("init_args"))
            check(part, within, resolved, confined)
    elif isinstance(value, list | tuple | set):
        for part in value:
            check(part, place, resolved, confined)
    elif isinstance(value, str):
        if _SPEC.search(value):
            raise ValueError(
                f"{place}: {value!r} is a string that names a class; no such class can be given "
                "there, or its options are wrong"
            )
        if not resolved:
            _check_regular(value, place)
    elif isinstance(value, _PLAIN):
        return
    elif inspect.isclass(value) or inspect.ismodule(value) or callable(value):
        path = _path_of(value)
        known = any(value is thing for thing in _allowed.values())
        if not known and not is_trusted(path):
            _refuse(place, path)


def _check_class(parts: dict[str, Any], place: str, resolved: bool = True) -> None:
    path = parts["class_path"]
    rest = {key: part for key, part in parts.items() if key != "class_path"}
    if isinstance(path, str) and is_trusted(path):
        check(rest, place, resolved, confined=False)
    elif isinstance(path, str) and (path in _allowed or not (resolved or "." in path)):
        for key, part in rest.items():
            _check_plain(part, f"{place}.{key}", path)
            if not resolved:
                given = part if isinstance(part, dict) else {key: part}
                for name, value in given.items():
                    within = f"{place}.{key}.{name}" if given is part else f"{place}.{name}"
                    _check_place(name, value, within, path, inside=True)
    else:
        _refuse(place, str(path))


def _check_place(
    key: Any, value: Any, place: str, path: str | None = None, inside: bool = False
) -> None:
    """Refuse a folder or file name of a mapping that leads out of the folders of a run.

    The words of a command line may name any; a class that is trusted may be given any.

    Args:
        inside: the mapping holds what a class is given, of which more become names of files.
    """
    names = _FOLDERS | (_FILES if inside else frozenset())
    if str(key).rpartition(".")[2] not in names or not isinstance(value, str):
        return
    if "://" in value or value.startswith(("/", "~")) or ".." in Path(value).parts:
        more = f", or trust the class with {OPTION} {path}" if path and "." in path else ""
        raise ValueError(
            f"{place}: {value!r} leads out of the working folder, which a configuration may not; "
            f"name a folder below it, give the option as a word of the command line{more}"
        )


def _check_regular(value: str, place: str) -> None:
    """Refuse a value that names a pipe, a device or a socket: reading one may never end."""
    try:
        path = os.path.expanduser(value.removeprefix("file://"))
        mode = os.stat(path).st_mode if len(value) < _PATH else stat.S_IFREG
    except (OSError, ValueError):
        return  # names nothing
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{place}: {value!r} is no regular file, and nothing else is read")


def _check_plain(value: Any, place: str, owner: str) -> None:
    """Refuse what a class is given, if it is more than data."""
    if isinstance(value, Namespace | dict):
        parts = vars(value) if isinstance(value, Namespace) else value
        if "class_path" in parts:
            if not is_trusted(str(parts["class_path"])):
                _refuse(place, str(parts["class_path"]))
            _check_class(parts, place)
            return
        for key, part in parts.items():
            _check_plain(part, f"{place}.{key}", owner)
    elif isinstance(value, list | tuple | set):
        for part in value:
            _check_plain(part, place, owner)
    elif isinstance(value, str):
        check(value, place)
    elif not isinstance(value, _PLAIN):
        path = _path_of(value)
        if not is_trusted(path):
            raise ValueError(f"{place}: {owner} takes plain data alone, not {path}; {advice(path)}")


def _path_of(value: Any) -> str:
    if inspect.ismodule(value):
        return value.__name__
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _refuse(place: str, path: str) -> NoReturn:
    where = f"{place}: " if place else ""
    raise ValueError(f"{where}{path} is not among what a configuration may name; {advice(path)}")


_load = get_loader("yaml")


def _load_bounded(text: str) -> Any:
    """YAML of a file, or of a value on the command line."""
    check_yaml(text)
    value = _load(text)
    if isinstance(value, dict | list):
        check(value, resolved=False)  # the parser may drop the path and keep the options
    return value


set_loader("yaml", _load_bounded, exceptions=(yaml.YAMLError,))
