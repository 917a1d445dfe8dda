"""Signals to a whole shell pipeline, which also end the reader of what a training prints."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from looplab.testing import read_scalars

ROOT = Path(__file__).parent.parent.parent

PRINTS = """
import time, keras, numpy as np, looplab

class Print(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.02)
        print("batch", batch, flush=batch % 2 == 0)

trainer = looplab.Trainer(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse", log_dir="run")
trainer.fit(np.ones((64, 4)), np.ones((64, 1)), batch_size=2, epochs=1000, verbose=2, callbacks=[Print()])
"""


@pytest.mark.parametrize(
    ("number", "pipe"), [(signal.SIGINT, "2>&1 |"), (signal.SIGINT, "|"), (signal.SIGTERM, "2>&1 |")], ids=str
)
def test_a_signal_that_also_ends_tee_saves_and_gives_its_status(number, pipe, tmp_path):
    (tmp_path / "program.py").write_text(PRINTS)
    script = f'trap : INT TERM; {shlex.quote(sys.executable)} program.py {pipe} tee log; echo "${{PIPESTATUS[*]}}"'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=env, process_group=0, **pipes) as shell:
        try:
            while shell.poll() is None and not list(tmp_path.glob("run/checkpoints/step-*")):
                time.sleep(0.1)
            os.killpg(shell.pid, number)
            output, _ = shell.communicate(timeout=60)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert output.splitlines()[-1] == f"{128 + number} {128 + number}"  # of Python and of tee
    saved = max(int(path.name.split("-")[1]) for path in tmp_path.glob("run/checkpoints/step-*"))
    assert saved % 32 != 0  # in the middle of an epoch
    assert read_scalars(tmp_path / "run" / "train")["batch_loss"][0][-1] == saved
