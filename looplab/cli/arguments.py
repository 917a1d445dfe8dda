"""The arguments of a recipe: their types and help, their values from words of a command line and from JSON."""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import docstring_parser
import numpy as np
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

REQUIRED = inspect.Parameter.empty  # the default of an argument that has none
_CONTAINERS = (tuple, list, set, frozenset, dict)


class Argument(NamedTuple):
    """A keyword argument of a function, or a field of a dataclass."""

    name: str
    type: Any
    """As annotated. Where the annotation is missing, or a container's without its parts, the default's type; Any where
    that says nothing either; the text of an annotation that names what only type checkers know."""
    default: Any
    help: str

    @property
    def is_group(self) -> bool:
        """Whether the default is a dataclass, whose fields are flags of their own."""
        return is_dataclass(self.default) and not isinstance(self.default, type)


def arguments(owner: Callable) -> list[Argument]:
    """The keyword arguments of a function, or of a dataclass, with their lines of its docstring."""
    described = docstring_parser.parse(inspect.getdoc(owner) or "").params
    lines = {argument.arg_name: " ".join((argument.description or "").split()) for argument in described}
    return [
        Argument(name, _type(_evaluated(owner, p.annotation), p.default), p.default, lines.get(name, ""))
        for name, p in inspect.signature(owner).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def spec_of(kind: Any) -> PrimitiveConstructorSpec | None:
    """How words become a value of this type; None where they cannot, or do not say which word is whose."""
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
        ValueError: They give none.
    """
    spec = spec_of(kind)
    assert spec is not None
    if issubclass(class_of(kind), Mapping) and all("=" in word for word in words):
        words = [part for word in words for part in word.split("=", 1)]
    if isinstance(spec.nargs, int) and len(words) != spec.nargs:
        raise ValueError(f"expected {spec.nargs} values, got {len(words)}")
    if spec.nargs == 1 and spec.choices and words[0] not in spec.choices:
        raise ValueError(f"invalid choice: {words[0]!r} (choose from {', '.join(spec.choices)})")
    try:
        return spec.instance_from_str(list(words))
    except Exception as error:  # of whatever type: tyro calls the type itself
        name = metavar(without_none(kind)).lower()
        apart = " (separate values by spaces)" if spec.nargs != 1 else ""
        raise ValueError(f"invalid {name} value: {' '.join(words)!r}{apart}") from error


def from_json(kind: Any, value: Any) -> Any:
    """The value of this type that JSON holds as `value`; as it is, where nothing is known of the type.

    Raises:
        TypeError, ValueError: The type has no such value.
    """
    if value is None:
        return None
    kind, class_ = without_none(kind), class_of(kind)
    if is_dataclass(class_):
        kinds, derived = {a.name: a.type for a in arguments(class_)}, {f.name for f in fields(class_) if not f.init}
        parts = {name: part for name, part in dict(value).items() if name not in derived}
        return class_(**{name: from_json(kinds.get(name, Any), part) for name, part in parts.items()})
    if isinstance(value, list | dict) and issubclass(class_, _CONTAINERS):
        value = class_._make(value) if hasattr(class_, "_make") else class_(value)
        if kind is class_:  # nothing is known of its parts
            return value
    spec = spec_of(kind)
    if kind is Any or spec is None or isinstance(value, bool | int | float) or spec.is_instance(value):
        return value
    return read(kind, list(_words(value)))


def class_of(kind: Any) -> type:
    """The class of a type's values: tuple for `tuple[int, ...] | None`; object where it has several."""
    kind = without_none(kind)
    class_ = typing.get_origin(kind) or kind
    return class_ if isinstance(class_, type) else object


def without_none(kind: Any) -> Any:
    """Of `int | None`, int."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return parts[0] if _is_union(kind) and len(parts) == 1 else kind


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_ambiguous(kind: Any) -> bool:
    """Whether it has parts of any number of words, and nothing that parts them."""
    parts = [part for part in typing.get_args(kind) if part is not ...]
    if typing.get_origin(kind) is typing.Literal:
        return False
    if _is_union(kind):
        return any(map(_is_ambiguous, parts))
    return any(spec is None or not isinstance(spec.nargs, int) for spec in map(spec_of, parts))


def _words(value: Any) -> Iterator[str]:
    """All words of a value, each part's after the other's."""
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _words(part)
    else:
        yield str(value)


def _evaluated(owner: Callable, annotation: Any) -> Any:
    """An annotation, of which all or a part may be text."""
    try:
        scope = vars(sys.modules[owner.__module__]) if inspect.isclass(owner) else inspect.unwrap(owner).__globals__
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"_": annotation}), scope)["_"]
    except Exception:  # whatever evaluating it raises
        return annotation


def _type(annotation: Any, default: Any) -> Any:
    """The type that an annotation and a default make together."""
    if is_dataclass(default) and not isinstance(default, type):
        return type(default)
    default = default.item() if isinstance(default, np.generic) else default
    if annotation in (REQUIRED, Any, object):
        if type(default) in _CONTAINERS:
            return _container(default, ())
        return Any if default is None or default is REQUIRED else type(default)
    class_, parts = class_of(annotation), typing.get_args(without_none(annotation))
    names_all = class_ is object or (parts and not inspect.isabstract(class_))
    if names_all or type(default) not in _CONTAINERS or not isinstance(default, class_):
        return annotation
    kind = _container(default, parts)
    return kind if without_none(annotation) is annotation else kind | None


def _container(value: Any, parts: tuple) -> Any:
    """The type of a container; `parts` are the types of its parts, where they are known."""
    kind = type(value)
    if not value and not parts:
        return kind
    if kind is dict:
        return dict[parts or (_any_of(value), _any_of(value.values()))]  # type: ignore[misc]
    inner = parts[0] if parts else _any_of(value)
    return kind[(inner, ...)] if kind is tuple else kind[inner]


def _any_of(values: Iterable[Any]) -> Any:
    """The union of the values' types; text comes last, because all words are text."""
    return typing.Union[tuple(sorted(dict.fromkeys(map(_part, values)), key=lambda kind: kind is str))]  # noqa: UP007


def _part(value: Any) -> Any:
    """The type of a value in a container: that of a tuple has as many parts."""
    if type(value) is tuple and value:
        return tuple[tuple(map(_part, value))]  # type: ignore[misc]
    return type(None) if value is None else _type(REQUIRED, value)
