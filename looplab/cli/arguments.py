"""The arguments of a recipe: their types, their help, and their values as words of a command line."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec

REQUIRED = inspect.Parameter.empty  # stands for the default of an argument that has none
_CONTAINERS = (tuple, list, set, frozenset, dict)


class Argument(NamedTuple):
    """A keyword argument of a function, or a field of a dataclass."""

    name: str
    type: Any
    """The annotation. Without one, or if it is a container's without its parts, the type of the default, or Any; a
    string if it names what only type checkers know."""
    default: Any
    help: str
    key: str
    """`name`, or `argument.name` for a field of an argument whose default is a dataclass."""


def arguments(owner: Callable) -> list[Argument]:
    """The keyword arguments of a function or dataclass, with their lines of its docstring.

    An argument whose default is a dataclass stands for its fields.
    """
    import docstring_parser  # here, because programs without a command line would wait for it

    described = docstring_parser.parse(inspect.getdoc(owner) or "").params
    lines = {argument.arg_name: " ".join((argument.description or "").split()) for argument in described}
    found: list[Argument] = []
    for name, p in inspect.signature(owner).parameters.items():
        if is_dataclass(p.default) and not inspect.isclass(p.default) and not inspect.isclass(owner):
            fields = arguments(type(p.default))
            found += [
                field._replace(default=getattr(p.default, field.name), key=f"{name}.{field.name}") for field in fields
            ]
        elif p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            kind = _type(_evaluated(owner, p.annotation), p.default)
            found.append(Argument(name, kind, p.default, lines.get(name, ""), name))
    return found


def spec_of(kind: Any) -> PrimitiveConstructorSpec | None:
    """How words become a value of this type; None if they cannot, or if it is unclear where its parts end."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo  # as above

    plain = str if kind is Any else frozenset[str] if kind is frozenset else kind
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(plain, set()))
    return spec if isinstance(spec, PrimitiveConstructorSpec) and not _is_ambiguous(kind) else None


def metavar(kind: Any) -> str:
    """The types of a value's words, or of those that repeat: "INT", "{sgd,adam}", "STR FLOAT"."""
    spec = spec_of(kind)
    return re.sub(r"\[(.+) \[\1 \.\.\.\]\]", r"\1", spec.metavar) if spec else ""


def read(kind: Any, words: Sequence[str]) -> Any:
    """The value of this type that the words give.

    Raises:
        ValueError: There is none.
    """
    spec = spec_of(kind)
    if spec is None:
        raise ValueError(f"no words give a value of type {inspect.formatannotation(kind)}")
    if issubclass(class_of(kind), Mapping) and all("=" in word for word in words):
        words = [part for word in words for part in word.split("=", 1)]
    if isinstance(spec.nargs, int) and len(words) != spec.nargs:
        raise ValueError(f"expected {spec.nargs} values, got {len(words)}")
    if spec.nargs == 1 and spec.choices and words[0] not in spec.choices:
        raise ValueError(f"invalid choice: {words[0]!r} (choose from {', '.join(spec.choices)})")
    try:
        return spec.instance_from_str(list(words))
    except Exception as error:  # tyro calls the type, which may raise anything
        name = metavar(without_none(kind)).lower()
        apart = " (separate values by spaces)" if spec.nargs != 1 else ""
        raise ValueError(f"invalid {name} value: {' '.join(words)!r}{apart}") from error


def words_of(kind: Any, value: Any) -> Any:
    """A value of this type as JSON can hold it: the words of which `read` makes it, or else itself.

    None if JSON cannot hold it.
    """
    value = value.item() if isinstance(value, np.generic) else value
    value = str(value) if isinstance(value, PurePath) and class_of(kind) is str else value
    spec = spec_of(kind)
    if spec is not None and spec.is_instance(value):
        words = spec.str_from_instance(value)
        with contextlib.suppress(ValueError):
            if read(kind, words) == value or value != value:  # NaN
                return words
    return value if type(value) in (bool, int, float, str) else None


def class_of(kind: Any) -> type:
    """The class of a type's values: tuple for `tuple[int, ...] | None`; object if there are several."""
    kind = without_none(kind)
    class_ = typing.get_origin(kind) or kind
    return class_ if isinstance(class_, type) else object


def without_none(kind: Any) -> Any:
    """For `int | None`, int."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return parts[0] if _is_union(kind) and len(parts) == 1 else kind


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_ambiguous(kind: Any) -> bool:
    """Whether it has parts with any number of words, so that nothing separates them."""
    parts = [part for part in typing.get_args(kind) if part is not ...]
    if typing.get_origin(kind) is typing.Literal:
        return False
    if _is_union(kind):
        return any(map(_is_ambiguous, parts))
    return any(spec is None or not isinstance(spec.nargs, int) for spec in map(spec_of, parts))


def _evaluated(owner: Callable, annotation: Any) -> Any:
    """An annotation that may be, or contain, a string."""
    try:
        scope = vars(sys.modules[owner.__module__]) if inspect.isclass(owner) else inspect.unwrap(owner).__globals__
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"_": annotation}), scope)["_"]
    except Exception:  # evaluating it may raise anything
        return annotation


def _type(annotation: Any, default: Any) -> Any:
    """The type of an argument by its annotation and its default."""
    default = default.item() if isinstance(default, np.generic) else default
    if annotation in (REQUIRED, Any, object):
        annotation = Any if default is None or default is REQUIRED else type(default)
    class_, parts = class_of(annotation), typing.get_args(without_none(annotation))
    names_all = class_ is object or (parts and not inspect.isabstract(class_))
    if names_all or type(default) not in _CONTAINERS or not isinstance(default, class_):
        return annotation
    kind = _container(default, parts)
    return kind if without_none(annotation) is annotation else kind | None


def _container(value: Any, parts: tuple) -> Any:
    """The type of a container; `parts` are the types of its parts, if they are known."""
    kind = type(value)
    if not value and not parts:
        return kind
    if kind is dict:
        return dict[parts or (_any_of(value), _any_of(value.values()))]  # type: ignore[misc]
    inner = parts[0] if parts else _any_of(value)
    return kind[(inner, ...)] if kind is tuple else kind[inner]


def _any_of(values: Iterable[Any]) -> Any:
    """The union of the values' types, str last, because every word is a str."""
    return typing.Union[tuple(sorted(dict.fromkeys(map(_part, values)), key=lambda kind: kind is str))]  # noqa: UP007


def _part(value: Any) -> Any:
    """The type of a value in a container; the type of a tuple has as many parts as the tuple."""
    if type(value) is tuple and value:
        return tuple[tuple(map(_part, value))]  # type: ignore[misc]
    return type(None) if value is None else _type(REQUIRED, value)
