"""The flags of a recipe, and how their words and its arguments become each other."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from looplab.checkpoint.policy import Checkpoint
from looplab.cli.arguments import REQUIRED, Argument, arguments, read, words_of
from looplab.cli.recipe import Recipe, UsageError, defaults

Words = dict[str, list[str] | bool | int | float | str | None]
"""By flag, its words, or the value itself if no words are needed; None stands for an object that JSON cannot hold."""


@dataclasses.dataclass
class _Common:
    """The flags of every recipe: they belong to the run and the trainer.

    Args:
        seed: of the weights, the steps and the order of the data
        log_dir: folder for all files of the run (default: logs/<module of the recipe>/<time>)
        resume: continue the run in this folder, with the flags that it had; --epochs may be larger; if it is also
            --log-dir, a run that does not exist starts
        checkpoint_every: save all state every so many steps (default: every epoch)
        weights: .weights.h5 file to start from
        precision: Keras's policy for all layers; the mixed ones compute in 16 bits, faster if hardware supports it
        plot: PNG file for a copy of curves.png
        strategy: mirrored: train on all devices of this machine; multi_worker: on those of all processes that TF_CONFIG
            or Slurm names
        summary: print the layers and their output shapes, and exit
        predict: print the class of each PNG or JPEG file, using --weights, and exit
        verbose: 0: nothing; 1 or auto: a progress bar; 2: a line for each epoch
        steps_per_execution: steps in one graph call
        run_eagerly: run each step in Python, for debugging
        jit_compile: compile the step with XLA
        fused_updates: update large variables of Adam by one kernel each
        profile_steps: first and last training step of a profile for TensorBoard
    """

    seed: int = 0
    log_dir: str | None = None
    resume: str | None = None
    checkpoint_every: int | None = None
    weights: str | None = None
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    plot: str | None = None
    strategy: Literal["none", "mirrored", "multi_worker"] = "none"
    summary: bool = False
    predict: list[str] | None = None
    verbose: Literal["auto", 0, 1, 2] = "auto"
    steps_per_execution: Literal["auto"] | int = "auto"
    run_eagerly: bool = False
    jit_compile: bool = False
    fused_updates: bool = False
    profile_steps: tuple[int, int] | None = None


PROCESS = ("log_dir", "resume", "plot", "verbose", "strategy", "summary", "predict", "profile_steps")
"""The flags of one process, which a resumed run does not keep."""
_OF_TRAINER = {"steps_per_execution", "run_eagerly", "jit_compile", "fused_updates", "profile_steps"}
_PASSED_ON = {"seed", "log_dir", *_OF_TRAINER}  # a recipe may list them
IN_CONFIG = {"recipe", "optimizers", "data_source", "environment", "asked"}
"""What `config.json` has beside the arguments and `log_dir`."""
_AT_LEAST = {"seed": 0, "epochs": 1, "batch_size": 1, "limit": 1, "every": 1, "steps_per_execution": 1}


def flags_of(recipe: Callable[..., Recipe]) -> tuple[list[Argument], list[Argument]]:
    """The flags of a recipe's own arguments, and those of every recipe.

    Raises:
        UsageError: An argument has a name that looplab needs.
    """
    own, common = inspect.signature(recipe).parameters, arguments(_Common)
    for name in own:
        if name in IN_CONFIG | {flag.name for flag in common} - _PASSED_ON:
            raise UsageError(f"recipe `{recipe.__name__}`: `{name}` is a reserved argument name; rename it.")
    every = {"checkpoint_every": "checkpoint.every"}
    return arguments(recipe), [f._replace(key=every.get(f.name, f.name)) for f in common if f.name not in own]


def _by_key(recipe: Callable[..., Recipe]) -> tuple[dict[str, Argument], dict[str, Any]]:
    """All flags, those of `Checkpoint` included, and the defaults of arguments."""
    own, common = flags_of(recipe)
    of_checkpoint = [field._replace(key=f"checkpoint.{field.name}") for field in arguments(Checkpoint)]
    return {f.key: f for f in [*common, *of_checkpoint, *own]}, {"checkpoint": Checkpoint(), **defaults(recipe)}


def to_options(recipe: Callable[..., Recipe], words: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the words of flags give.

    Raises:
        UsageError: A flag has no such value, or stands for an object that must be passed again.
    """
    flags, default = _by_key(recipe)
    options: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in words.items():
        if value is None:
            raise UsageError(
                f"`resume`: `{key}` was an object that config.json cannot hold. Pass it again: "
                f"`looplab.run({recipe.__name__}, resume=..., {key}=...)`."
            )
        flag = flags.get(key, Argument(key, Any, REQUIRED, "", key))
        try:
            value = read(flag.type, value) if isinstance(value, list) else value
            if isinstance(value, int) and value < (least := _AT_LEAST.get(flag.name, value)):
                raise ValueError(f"must be at least {least}; got {value}")
        except ValueError as error:
            raise UsageError(f"argument {flag_name(flag.name)}: {error}") from error
        name, _, field = key.partition(".")
        if field and key in flags:
            groups.setdefault(name, {})[field] = value
        else:
            options[key] = value
    return options | {name: dataclasses.replace(default[name], **fields) for name, fields in groups.items()}


def to_words(recipe: Callable[..., Recipe], options: Mapping[str, Any]) -> Words:
    """The words of the flags that give these arguments, apart from defaults."""
    flags, default = _by_key(recipe)
    words: Words = {}
    for name, value in options.items():
        fields = {key: flag.type for key, flag in flags.items() if key.startswith(f"{name}.")}
        if fields and type(value) is type(default[name]):
            now, before = (
                {key: words_of(kind, getattr(group, key.partition(".")[2])) for key, kind in fields.items()}
                for group in (value, default[name])
            )
            changed = {key: given for key, given in now.items() if given != before[key]}
            words |= {name: None} if None in changed.values() else changed
        elif value is not default.get(name, REQUIRED):
            words[name] = words_of(flags[name].type if name in flags else Any, value)
    return words


def flag_name(argument: str) -> str:
    """`--batch-size` for `batch_size`."""
    return f"--{argument.replace('_', '-')}"
