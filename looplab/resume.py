"""Where a `fit` resumes: found in what was saved of its run, and compared with what the program asks for now."""

from __future__ import annotations

import dataclasses
from typing import Any

from looplab.checkpoint import Checkpoints
from looplab.plain_files import CheckpointError, Saved
from looplab.warn import warn


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Where one call of `fit` resumes."""

    newest: Saved | None = None
    """The newest checkpoint of the run, which may be of another call."""
    saved: Saved | None = None
    """The checkpoint to continue from; None where the call starts, or is complete."""

    @property
    def is_stopped(self) -> bool:
        """Whether a callback had stopped the call."""
        return self.saved is not None and bool(self.saved.tree["stopped_by"]) and not self.saved.tree["in_epoch"]

    def is_complete(self, epochs: int, callback_settings: dict[str, dict[str, str]]) -> bool:
        """Whether nothing is left to train, by the epochs and the callbacks of this call.

        A call that a callback stopped continues if it asks for more epochs, or the callback has other settings.
        """
        if self.saved is None:
            return False
        tree = self.saved.tree
        if not self.is_stopped:
            return not tree["in_epoch"] and tree["epoch"] >= epochs
        now, then, key = callback_settings, tree["callback_settings"], tree["stopped_by"]
        same_settings = now.get(key) == then[key] if key in then else now == then
        asks_the_same = epochs <= tree["epochs_asked"] and same_settings
        return asks_the_same or tree["epoch"] >= epochs

    def report(self, epochs: int, callback_settings: dict[str, dict[str, str]]) -> list[str]:
        """A line of what a call that was complete or stopped does now."""
        if self.saved is None:
            return []
        tree, is_complete = self.saved.tree, self.is_complete(epochs, callback_settings)
        done = tree["epoch"]
        if self.is_stopped:
            stopped = f"looplab: training stopped after epoch {done} of {tree['epochs_asked']} by {tree['stopped_by']}"
            if is_complete:
                return [f"{stopped}: nothing to train. To continue, ask for more `epochs`, or change the callback."]
            return [f"{stopped}: continuing to epoch {epochs}."]
        if is_complete:
            return [f"looplab: {done} epochs are done, and `epochs` is {epochs}: nothing to train."]
        return []

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
    """Where the call of `fit` of that number (from 0) of a run resumes; each checkpoint that is skipped is reported.

    Raises:
        CheckpointError: There are some, but none is whole; or the newest is of a newer format.
    """
    newest, skipped = checkpoints.newest()
    for reason in skipped:
        warn(f"Skipped: {reason}")
    return Resumed(newest, newest if newest is not None and newest.tree["fit"] == number else None)
