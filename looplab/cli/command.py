"""The command line of a recipe: its keyword arguments are the flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from looplab.checkpoint.files import CheckpointError
from looplab.checkpoint.policy import Checkpoint
from looplab.cli.arguments import REQUIRED, Argument, arguments, class_of, metavar, read, spec_of, without_none
from looplab.cli.make import predict, summarize
from looplab.cli.recipe import Recipe, UsageError, module_name
from looplab.cli.run import run
from looplab.compat import accept_negative_numbers
from looplab.data.named import DataError
from looplab.summaries.lock import InUseError
from looplab.warn import say


@dataclasses.dataclass
class _Common:
    """The flags of every recipe: they belong to the run and the trainer.

    Args:
        seed: of the weights, the steps and the order of the data
        log_dir: folder for all files of the run (default: logs/<module of the recipe>/<time>)
        resume: continue the run in this folder, with the flags that it had; --epochs may be larger
        checkpoint_every: save all state every so many steps (default: every epoch)
        weights: .weights.h5 file to start from
        precision: Keras's policy for all layers; the mixed ones compute in 16 bits, faster where hardware supports it
        plot: PNG file for a copy of curves.png
        summary: print the layers and their output shapes, and exit
        predict: print the class of each PNG or JPEG file, using --weights, and exit
        verbose: 0: nothing; 1 or auto: a progress bar; 2: a line for each epoch
        steps_per_execution: steps in one graph call
        run_eagerly: run each step in Python, for debugging
        jit_compile: compile the step with XLA
    """

    seed: int = 0
    log_dir: str | None = None
    resume: str | None = None
    checkpoint_every: int | None = None
    weights: str | None = None
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    plot: str | None = None
    summary: bool = False
    predict: list[str] | None = None
    verbose: Literal["auto", 0, 1, 2] = "auto"
    steps_per_execution: Literal["auto"] | int = "auto"
    run_eagerly: bool = False
    jit_compile: bool = False


# The smallest whole number of a flag, and the flags that a recipe may list among its own arguments.
_AT_LEAST = {"seed": 0, "epochs": 1, "batch_size": 1, "limit": 1, "checkpoint_every": 1, "steps_per_execution": 1}
_PASSED_ON = {"seed", "log_dir", "steps_per_execution", "run_eagerly", "jit_compile"}


def main(recipe: Callable[..., Recipe], argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The command line of a recipe: its keyword arguments, with types, defaults and docstring lines, are the flags.

    A list, tuple or set takes several words (`--layers 64 32`), a dict takes keys and values (`--rates a 0.1 b 1`, or
    `a=0.1 b=1`). An argument whose default is a dataclass has a flag for each field. Wrong flags, and arguments of a
    type that no flag can give, are reported before anything is written, with exit status 2.

    Args:
        recipe: The recipe function.
        argv: The words of the command line, by default those of the process.
        prog: The program's name in usage and errors.
    """
    module = module_name(recipe)
    parser = _Parser(
        prog=prog or (f"python -m {module}" if module != "__main__" else None),  # None is the script's name
        usage="%(prog)s [--flag VALUE ...]    (--help lists the flags)",
        description=(inspect.getdoc(recipe) or "").partition("\n")[0],
        argument_default=argparse.SUPPRESS,  # only what is on the command line is passed on
        allow_abbrev=False,
    )
    accept_negative_numbers(parser)
    try:
        with _warnings_in_one_line():
            own = arguments(recipe)
            groups = {argument.name: argument.default for argument in own if argument.is_group}
            flags = [flag for argument in own for flag in _flags_of(argument)]
            listed = {argument.name for argument in own} & _PASSED_ON
            common = [flag for flag in arguments(_Common) if flag.name not in listed]
            _add_flags(parser.add_argument_group(f"of {recipe.__name__}"), flags)
            _add_flags(parser.add_argument_group("of every recipe"), common)
            options = _parse(parser, [*flags, *common], argv)
            _run(recipe, options, groups)
    except (UsageError, DataError, CheckpointError, InUseError, argparse.ArgumentError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (FloatingPointError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


class _Parser(argparse.ArgumentParser):
    def print_help(self, file=None):  # a terminal that cannot encode a docstring shows it escaped
        say(self.format_help().rstrip("\n"), file)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Shows warnings without the line of code that warned, which says nothing to a user of the command line."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _flags_of(argument: Argument) -> list[Argument]:
    """The argument itself, or where its default is a dataclass, the fields."""
    if not argument.is_group:
        return [argument]
    return [field._replace(default=getattr(argument.default, field.name)) for field in arguments(argument.type)]


def _add_flags(group: Any, flags: list[Argument]) -> None:
    """Adds a flag for each argument.

    Raises:
        UsageError: No flag can give a value of an argument's type.
    """
    for flag in flags:
        spec = spec_of(flag.type)
        if spec is None:
            unknown = ", which is not defined at run time" if isinstance(flag.type, str) else ""
            raise UsageError(
                f"no flag can give `{flag.name}` a value of type {inspect.formatannotation(flag.type)}{unknown}. "
                f"Annotate it as str, int, float, bool, Path, an Enum, a Literal, or a list, tuple, set, dict or union "
                f"of these; or give it a dataclass as default, whose fields become flags; or call looplab.run."
            )
        default = ""  # that of None is in the docstring's line
        if flag.default is REQUIRED:
            default = "(required)"
        elif flag.default is not None:
            words = spec.str_from_instance(flag.default) if spec.is_instance(flag.default) else []
            default = f"(default: {' '.join(words) or flag.default})"
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if class_of(flag.type) is not bool:
            nargs = spec.nargs if isinstance(spec.nargs, int) else "*"
            name = metavar(without_none(flag.type) if flag.default is None else flag.type)
            options = {"nargs": nargs, "metavar": tuple(name.split()) if name.count(" ") + 1 == nargs else name}
        text = f"{flag.help} {default}".strip().replace("%", "%%")
        group.add_argument(_flag(flag.name), dest=flag.name, help=text, **options)


def _parse(parser: argparse.ArgumentParser, flags: list[Argument], argv: Sequence[str] | None) -> dict[str, Any]:
    """The values of the flags that are on the command line."""
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], [_flag(flag.name) for flag in flags], 1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
    given = vars(parsed)
    missing = [_flag(flag.name) for flag in flags if flag.default is REQUIRED and flag.name not in given]
    if missing and "resume" not in given:  # a run that is resumed has them
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    for flag in flags:
        if isinstance(given.get(flag.name), list):
            try:
                value = given[flag.name] = read(flag.type, given[flag.name])
                if isinstance(value, int) and value < (least := _AT_LEAST.get(flag.name, value)):
                    raise ValueError(f"must be at least {least}, got {value}")
            except ValueError as error:
                parser.error(f"argument {_flag(flag.name)}: {error}")
    return given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(recipe: Callable[..., Recipe], options: dict[str, Any], groups: dict[str, Any]) -> None:
    """Does what the flags ask for."""
    for name, group in groups.items():
        chosen = {f.name: options.pop(f.name) for f in dataclasses.fields(group) if f.name in options}
        if chosen:  # a run that is resumed keeps its other fields
            options[name] = chosen if "resume" in options else dataclasses.replace(group, **chosen)
    if "checkpoint_every" in options:
        options["checkpoint"] = Checkpoint(every=options.pop("checkpoint_every"))
    pictures, summary = options.pop("predict", None), options.pop("summary", False)
    if summary:
        summarize(recipe, **_without_run(options, "weights"))
    elif pictures is not None:
        if not pictures or "weights" not in options:
            raise UsageError("--predict needs pictures, and --weights FILE: the model.weights.h5 that a run left.")
        predictions = predict(recipe, pictures, **_without_run(options))
        for picture, (name, probability) in zip(pictures, predictions, strict=True):
            say(f"{picture}: {name} {probability:.4f}")
    else:
        run(recipe, **options)


def _without_run(options: dict[str, Any], *more: str) -> dict[str, Any]:
    """The options without those of a training."""
    unused = ("log_dir", "plot", "verbose", "checkpoint", *more)
    return {name: value for name, value in options.items() if name not in unused}
