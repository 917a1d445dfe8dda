"""Where a `fit` goes on: found in what was saved of its run, and held against what the program is now."""

from __future__ import annotations

import dataclasses
from typing import Any

from looplab.checkpoint import Checkpoints
from looplab.plain_files import CheckpointError, Saved
from looplab.warn import warn


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Where one call of `fit` goes on."""

    newest: Saved | None = None
    """The newest checkpoint of the run, maybe of another call."""
    saved: Saved | None = None
    """The checkpoint to go on from; None where the call begins."""
    again: bool = False
    """Whether it was finished before: all is brought to where it ended, and nothing is written."""

    def check(self, seed: int | None, described: dict[str, Any], made_with: dict[str, dict[str, str]]) -> None:
        """What was saved is of the same seed and data; warns where it is of another loss or optimizer.

        Args:
            seed: What the trainer was given, if anything.
            described: As `Batches.described`.
            made_with: The `state.settings` of loss and optimizer.

        Raises:
            CheckpointError: It is not.
        """
        if self.saved is None:
            return
        path, tree = self.saved.path, self.saved.tree
        for name, before, now in [
            ("seed", tree["seed"], tree["seed"] if seed is None else seed),
            *((name, tree["data"].get(name), value) for name, value in described.items()),
        ]:
            if before != now:
                raise CheckpointError(
                    f"`resume`: the run in {path.parent.parent} has {name} {before}, and now it is {now}. Pass what it "
                    f"was, or start another run in another `log_dir`."
                )
        for name, now in made_with.items():
            then = tree["made_with"].get(name) or {}
            for setting in {**then, **now}:
                was, is_now = then.get(setting), now.get(setting)
                if was != is_now:
                    warn(
                        f"`resume`: {setting} of `{name}` was {was}, and now it is {is_now}. Numbers that a training "
                        f"changes, such as a rate, go on as they were saved; all else is as it is now."
                    )


def find(checkpoints: Checkpoints, number: int) -> Resumed:
    """Where the call of `fit` of that number (from 0) of a run goes on; each checkpoint that is skipped is told.

    Raises:
        CheckpointError: There are some, but none is whole; or the newest is of a newer format.
    """
    newest, skipped = checkpoints.newest()
    for reason in skipped:
        warn(f"Skipped: {reason}")
    if newest is None or newest.tree["fit"] < number:
        return Resumed(newest)
    if newest.tree["fit"] == number:
        return Resumed(newest, newest)
    print(f"looplab: call {number + 1} of `fit` in {checkpoints.folder.parent} was finished before.", flush=True)
    return Resumed(newest, checkpoints.last_of_fit(number), again=True)
