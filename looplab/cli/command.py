"""The command line of a recipe."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from looplab.checkpoint.files import CheckpointError
from looplab.cli.arguments import REQUIRED, Argument, class_of, metavar, spec_of, without_none
from looplab.cli.files import read_config
from looplab.cli.flags import PROCESS, flag_name, flags_of, to_options
from looplab.cli.make import predict, summarize
from looplab.cli.recipe import Recipe, UsageError, module_name, usage_errors
from looplab.cli.run import run
from looplab.compat import accept_negative_numbers
from looplab.data.named import DataError
from looplab.loop.saving import COMMAND
from looplab.paths import local_path
from looplab.strategies import create
from looplab.summaries.lock import InUseError
from looplab.warn import say
from looplab.workers import Workers


def main(recipe: Callable[..., Recipe], argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The command line of a recipe: its keyword arguments, with types, defaults and docstring lines, are the flags.

    A list, tuple or set takes several words (`--layers 64 32`), a dict takes keys and values (`--rates a 0.1 b 1`, or
    `a=0.1 b=1`). An argument whose default is a dataclass has a flag for each field. Wrong flags, and arguments of a
    type that no flag can give, are reported before anything is written, with exit status 2.

    Args:
        recipe: The recipe function.
        argv: The words of the command line, by default those of the process.
        prog: The program's name in usage, errors and printed commands.
    """
    module = module_name(recipe)
    script = f"python {shlex.quote(sys.argv[0])}"
    parser = _Parser(
        prog=prog or (script if module == "__main__" else f"python -m {module}"),
        usage="%(prog)s [--help] [--flag VALUE ...]",
        description=(inspect.getdoc(recipe) or "").partition("\n")[0],
        argument_default=argparse.SUPPRESS,  # only flags on the command line are passed on
        allow_abbrev=False,
    )
    accept_negative_numbers(parser)
    try:
        with _as_program(parser.prog):
            own, common = flags_of(recipe)
            _add_flags(parser.add_argument_group(f"of {recipe.__name__}"), own)
            _add_flags(parser.add_argument_group("of every recipe"), common)
            _run(recipe, _parse(parser, [*own, *common], argv))
    except (UsageError, DataError, CheckpointError, InUseError, argparse.ArgumentError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (FloatingPointError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


class _Parser(argparse.ArgumentParser):
    def print_help(self, file=None):  # in a terminal that cannot show a character of a docstring, it is escaped
        say(self.format_help().rstrip("\n"), file)


@contextlib.contextmanager
def _as_program(command: str) -> Iterator[None]:
    """Prints warnings without the line of code that warns, and the command that resumes an interrupted training."""
    before, token = warnings.formatwarning, COMMAND.set(command)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
        COMMAND.reset(token)


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
        default = ""  # for None, the docstring says what it means
        if flag.default is REQUIRED:
            default = "(required)"
        elif flag.default is not None and flag.default is not False:
            words = spec.str_from_instance(flag.default) if spec.is_instance(flag.default) else []
            default = f"(default: {' '.join(words) or flag.default})"
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if class_of(flag.type) is not bool:
            nargs = spec.nargs if isinstance(spec.nargs, int) else "*"
            name = metavar(without_none(flag.type) if flag.default is None else flag.type)
            options = {"nargs": nargs, "metavar": tuple(name.split()) if name.count(" ") + 1 == nargs else name}
        text = f"{flag.help} {default}".strip().replace("%", "%%")
        group.add_argument(flag_name(flag.name), dest=flag.key, help=text, **options)


def _parse(parser: argparse.ArgumentParser, flags: list[Argument], argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags on the command line: their words, or True or False."""
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], [flag_name(flag.name) for flag in flags], 1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
    words = vars(parsed)
    missing = [flag_name(flag.name) for flag in flags if flag.default is REQUIRED and flag.key not in words]
    if missing and "resume" not in words:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return words


def _run(recipe: Callable[..., Recipe], words: dict[str, Any]) -> None:
    """Does what the flags ask for."""
    if "strategy" in words:
        COMMAND.set(f"{COMMAND.get()} --strategy {words['strategy'][0]}")
    if "resume" in words:
        with usage_errors():
            folder = local_path("resume", *words["resume"])
            workers = Workers(create(*words.get("strategy", ["none"])))
        before = workers.of_chief(lambda: read_config(recipe, folder, "log_dir" in words))
        words = ({} if before is None else before["asked"]) | words
    options = to_options(recipe, words)
    is_summary, pictures = options.pop("summary", False), options.pop("predict", None)
    if not is_summary and pictures is None:
        run(recipe, **options)
        return
    options = {name: value for name, value in options.items() if name not in (*PROCESS, "checkpoint")}
    if is_summary:
        options.pop("weights", None)
        summarize(recipe, **options)
        return
    if not pictures or "weights" not in options:
        raise UsageError("--predict needs pictures, and --weights FILE: the model.weights.h5 that a run left.")
    predictions = predict(recipe, pictures, **options)
    for picture, (name, probability) in zip(pictures, predictions, strict=True):
        say(f"{picture}: {name} {probability:.4f}")
