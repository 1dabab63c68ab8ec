"""Things found by their name: one file each, and their options are the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tokenclean.trust import advice, is_trusted

#: What an option of a rule or a weighting may be.
Value = bool | int | float | str | None
#: Plain data, as deep as arms and their options lie in a study's; nothing that names a class.
_Flat = Value | list[Value] | dict[str, Value]
_Deep = Value | list[_Flat] | dict[str, _Flat]
Plain = Value | list[_Deep] | dict[str, _Deep]

T = TypeVar("T")


def names_in(package: str) -> list[str]:
    """The modules of a package that can be named: all but those that begin with an underscore."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def make(
    kind: type[T], package: str, name: str, options: Mapping[str, Value] | None, place: str
) -> T:
    """The thing of a name, with its options.

    A name without a dot is a module of ``package``; one with dots is a module anywhere on the
    Python path, so that others add theirs without a change here, and must be trusted on the command
    line. The module holds exactly one dataclass derived from ``kind``.

    Args:
        kind: base class.
        package: where the project's own are.
        name: of the module.
        options: values for the dataclass's fields.
        place: the option that named it, for error messages: ``selection.rule``.

    Raises:
        ValueError: for an unknown name or option, a module that is not trusted, or a value of
            another type than the field's.
    """
    cls = _class(kind, package, name, place)
    hints = get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    given = dict(options or {})
    where = f"{place}: the options of {name}"
    if unknown := sorted(set(given) - set(fields)):
        has = f"they are {', '.join(fields)}" if fields else "it has none"
        raise ValueError(f"{where} have no {', '.join(unknown)}; {has}")
    for key, value in given.items():
        if not _fits(value, fields[key]):
            wanted = getattr(fields[key], "__name__", None) or str(fields[key])
            raise ValueError(f"{where}: {key} = {value!r} is not of type {wanted}")
        if fields[key] is float:
            given[key] = float(value)  # type: ignore[arg-type]
    return cls(**given)


def options_of(thing: Any) -> dict[str, Value]:
    """The options that a thing made by `make` has, defaults included."""
    return {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}


def _class(kind: type[T], package: str, name: str, place: str) -> type[T]:
    known = names_in(package)
    if "." in name and name not in [f"{package}.{module}" for module in known]:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{place}: {name!r} is no dotted name of a module")
        if not is_trusted(name):
            raise ValueError(f"{place}: {name} is not of this package; {advice(name)}")
    if "." not in name and name not in known:
        raise ValueError(
            f"{place}: {name!r} is not one of {', '.join(known)}; your own is named by its module, "
            "such as my_package.my_rule"
        )
    try:
        module = importlib.import_module(name if "." in name else f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{place}: there is no module {name}; is its folder on PYTHONPATH?"
        ) from None
    except TypeError as error:
        # a dataclass that does not go with its base class, mostly
        raise ValueError(f"{place}: {name} cannot be loaded: {error}") from error
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, kind)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(own) != 1:
        raise ValueError(
            f"{place}: {module.__name__} holds {len(own)} classes derived from {kind.__name__}; "
            "exactly one is needed"
        )
    if "__dataclass_fields__" not in vars(own[0]):
        raise ValueError(
            f"{place}: {own[0].__name__} must be a dataclass of its own, like its base class: its "
            "fields are options"
        )
    return own[0]


def _fits(value: Value, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint not in (bool, str, NoneType):
        raise ValueError(f"an option of type {hint} is none that a configuration can give")
    return value is None if hint is NoneType else isinstance(value, hint)
