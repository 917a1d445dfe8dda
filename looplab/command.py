"""The command line of a recipe: its keyword arguments are the flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from looplab.checkpoint import Checkpoint
from looplab.datasets import DataError
from looplab.lock import InUseError
from looplab.plain_files import CheckpointError
from looplab.recipe import Recipe, UsageError, module_name
from looplab.running import predict, run, summarize


def main(recipe: Callable[..., Recipe], argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The command line of a recipe: its keyword arguments, with types, defaults and docstring lines, are the flags.

    Args:
        recipe: The recipe function.
        argv: The arguments, by default those of the process.
        prog: How usage and errors call the program.
    """
    parser = _Parser(
        prog=prog or f"python -m {module_name(recipe)}",
        description=(inspect.getdoc(recipe) or "").partition("\n")[0],
        allow_abbrev=False,
        conflict_handler="resolve",  # a recipe may have `seed` as an argument: `run` passes it on
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = _add_recipe_flags(parser, recipe)
    _add_common_flags(parser)
    options = parser.given(argv)
    pictures, summary = options.pop("predict", None), options.pop("summary", False)
    if "checkpoint_every" in options:
        options["checkpoint"] = Checkpoint(every=options.pop("checkpoint_every"))
    if pictures and "weights" not in options:
        parser.error("--predict needs --weights FILE: the model.weights.h5 that a run left")
    try:
        with _warnings_in_one_line():
            _run(recipe, options, groups, pictures, summary)
    except (UsageError, DataError, CheckpointError, InUseError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (FloatingPointError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _run(recipe: Callable[..., Recipe], options: dict[str, Any], groups: Any, pictures: Any, summary: bool) -> None:
    """Does what the flags ask for."""
    for name, (group, fields) in groups.items():
        chosen = {field: options.pop(field) for field in fields if field in options}
        if chosen:  # a run that goes on has the others as they were
            options[name] = chosen if "resume" in options else dataclasses.replace(group, **chosen)
    if summary:
        summarize(recipe, **_without_run(options, "weights"))
    elif pictures:
        predictions = predict(recipe, pictures, **_without_run(options))
        for picture, (name, probability) in zip(pictures, predictions, strict=True):
            print(f"{picture}: {name} {probability:.4f}")
    else:
        run(recipe, **options)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """A line of the program that warned tells a user of the command line nothing."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _without_run(options: dict[str, Any], *more: str) -> dict[str, Any]:
    """The options without those of a training."""
    return {
        name: value
        for name, value in options.items()
        if name not in ("log_dir", "plot", "verbose", "checkpoint", *more)
    }


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag where one is unknown."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            self.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
        return parsed

    def given(self, args: Sequence[str] | None) -> dict[str, Any]:
        """The flags that stand in the command line; of others the functions that they are for know the defaults."""
        resumes = "--resume" in " ".join(sys.argv[1:] if args is None else args).replace("=", " ").split()
        for action in self._actions:
            action.required = action.required and not resumes  # the run has it
        self.parse_args(args)
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return vars(self.parse_args(args))


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What belongs to the run and the trainer, not to one recipe."""
    flags = parser.add_argument_group("of every recipe")
    flags.add_argument(
        "--seed",
        type=functools.partial(_whole, 0),
        metavar="N",
        default=0,
        help="of the weights, the steps and the order of the data",
    )
    flags.add_argument(
        "--log-dir",
        help="folder for all that the run leaves (default: logs/<recipe>/<time>)",
        default=argparse.SUPPRESS,
    )
    flags.add_argument(
        "--resume",
        metavar="LOG_DIR",
        help="go on with the run in this folder, by the flags that it had; --epochs may be more",
        default=argparse.SUPPRESS,
    )
    flags.add_argument(
        "--checkpoint-every",
        type=functools.partial(_whole, 1),
        metavar="N",
        help="save all state every N steps (default: every epoch)",
        default=argparse.SUPPRESS,
    )
    flags.add_argument("--weights", metavar="FILE", help=".weights.h5 file to start from", default=argparse.SUPPRESS)
    flags.add_argument(
        "--precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        default="float32",
        help="Keras's policy for all layers: the mixed ones compute in 16 bits where processors are made for that",
    )
    flags.add_argument("--plot", metavar="FILE", help="PNG file for the curves, too", default=argparse.SUPPRESS)
    flags.add_argument("--summary", action="store_true", help="print the layers and their output shapes, and exit")
    flags.add_argument(
        "--predict",
        nargs="+",
        metavar="PICTURE",
        help="print the class of each PNG or JPEG file, by --weights, and exit",
        default=argparse.SUPPRESS,
    )
    flags.add_argument(
        "--verbose", type=_verbose, default="auto", help="0: nothing; 1 or auto: a bar; 2: a line an epoch"
    )
    flags.add_argument(
        "--steps-per-execution", type=_auto_or_positive, default="auto", metavar="N", help="steps in one graph call"
    )
    flags.add_argument("--run-eagerly", action="store_true", help="step through Python, to debug")
    flags.add_argument("--jit-compile", action="store_true", help="compile the step with XLA")


def _add_recipe_flags(
    parser: argparse.ArgumentParser, recipe: Callable[..., Recipe]
) -> dict[str, tuple[Any, list[str]]]:
    """Adds the function's keyword arguments; returns those that are a dataclass, whose fields are the flags."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    flags = parser.add_argument_group(f"of {recipe.__name__}")
    for name, kind, default, text in _parameters(recipe):
        if dataclasses.is_dataclass(default):
            fields = _parameters(type(default))
            groups[name] = default, [field for field, *_ in fields]
            for field, field_kind, _, field_text in fields:
                _add_flag(flags, field, field_kind, getattr(default, field), field_text)
        else:
            _add_flag(flags, name, kind, default, text)
    return groups


def _add_flag(flags: Any, name: str, kind: Any, default: Any, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    if default is None:  # the docstring tells what happens then
        default = argparse.SUPPRESS
    text = text.replace("%", "%%") or "(default: %(default)s)"
    if default is inspect.Parameter.empty:
        flags.add_argument(flag, type=kind, required=True, metavar=kind.__name__.upper(), help=text)
        return
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(inner for inner in typing.get_args(kind) if inner is not type(None))
    if kind is bool:
        flags.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        flags.add_argument(flag, type=type(choices[0]), choices=choices, default=default, help=text)
    elif kind is int and name in ("epochs", "batch_size", "limit"):
        flags.add_argument(flag, type=functools.partial(_whole, 1), default=default, metavar="N", help=text)
    else:
        flags.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text)


def _parameters(function: Callable) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, docstring line) of each keyword argument."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    lines = _argument_lines(inspect.getdoc(function) or "")
    return [
        (name, hints.get(name, type(parameter.default)), parameter.default, lines.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _argument_lines(doc: str) -> dict[str, str]:
    """The lines of a docstring's `Args:`, by argument."""
    lines: dict[str, str] = {}
    name = ""
    for line in doc.partition("Args:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, line = line.strip().partition(":")
        lines[name] = f"{lines.get(name, '')} {line.strip()}".strip()
    return lines


def _whole(minimum: int, text: str) -> int:
    if not text.lstrip("+-").isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}; {text} came")
    return int(text)


def _auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else _whole(1, text)


def _verbose(text: str) -> int | str:
    if text not in ("auto", "0", "1", "2"):
        raise argparse.ArgumentTypeError(f"must be auto, 0, 1 or 2; {text} came")
    return text if text == "auto" else int(text)
