"""What a run shows in a terminal, and in what folder it leaves its files."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from looplab.loop.costs import REMEDIES

SCRIPT = """
import keras, numpy as np, looplab

def build(metrics: int = 5, epochs: int = 2, **options):
    x = np.random.default_rng(0).normal(size=(200, 2)).astype("float32")
    metrics = [keras.metrics.MeanSquaredError(name=f"a_metric_of_a_rather_long_name_{i}") for i in range(metrics)]
    model = keras.Sequential([keras.layers.Dense(1)])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", metrics=metrics, **options)
    return looplab.Recipe(trainer, (x, x[:, :1]), (x, x[:, :1]), epochs=epochs)

looplab.main(build, [])
looplab.main(build, ["--metrics", "0"])
del __file__  # as in a notebook
looplab.main(build, ["--verbose", "0"])
"""


SLOW = """
import sys, time, keras, numpy as np, looplab

class Slow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        time.sleep(1.5)

model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
trainer = looplab.Trainer(model, optimizer="sgd", loss="mse")
x = np.ones((8, 2), "float32")
trainer.fit(x, x[:, :1], epochs=2, callbacks=[Slow()], verbose=int(sys.argv[1]))
"""


def lines_of_a_terminal(command, columns, **options):
    """The lines that a terminal of so many columns has in the end."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, **options) as process:
        os.close(terminal)
        written = b""
        try:
            while part := os.read(screen, 4096):
                written += part
        except OSError:  # the other side is closed
            pass
    os.close(screen)
    assert process.returncode == 0, written.decode()
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", written.decode()):
        if part == "\x1b[A":
            row -= 1
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part != "\r":  # text only ever starts at the left
            lines[row] = part + lines[row][len(part) :]
    return [line.rstrip() for line in lines]


def test_a_finished_epoch_shows_loss_and_val_loss_at_80_columns(tmp_path):
    (tmp_path / "wide_recipe.py").write_text(SCRIPT)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    lines = lines_of_a_terminal([sys.executable, "wide_recipe.py"], 80, cwd=tmp_path, env=environment)
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 4
    assert max(map(len, epochs)) < 80
    folders = sorted((tmp_path / "logs" / "wide_recipe").iterdir())
    assert len(folders) == 2
    for index, line in enumerate(epochs):
        history = json.loads((folders[index // 2] / "history.json").read_text())
        values = ", ".join(f"{name}={history[name][index % 2]:.4g}" for name in ("loss", "val_loss"))
        assert line.startswith(f"epoch {index % 2 + 1}/2, {values} [7 in 00:")
    assert len(list((tmp_path / "logs" / "build").iterdir())) == 1


@pytest.mark.parametrize("verbose", ["1", "2"])
def test_what_took_long_has_a_line_of_its_own_below_that_of_the_epoch(tmp_path, verbose):
    (tmp_path / "slow.py").write_text(SLOW)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    lines = lines_of_a_terminal([sys.executable, "slow.py", verbose], 80, cwd=tmp_path, env=environment)
    shown = [line for line in lines if line.startswith(("epoch", "looplab"))]
    remark = rf"looplab: \d+% of the epoch went to {REMEDIES['callbacks']}\."
    for line, pattern in zip(shown, ["epoch 1/2", remark, "epoch 2/2", remark], strict=True):
        assert re.match(pattern, line)
    assert max(len(line) for line in shown if line.startswith("epoch")) < 80
