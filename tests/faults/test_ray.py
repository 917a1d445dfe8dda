"""The README's example for Ray: Ray starts two workers, and starts them again when one is killed."""

import json
import os
import re
import subprocess
import sys

import pytest

from looplab.testing import read_scalars
from tests.test_docs import README, ROOT

KILL = """
            killed = Path(settings["log_dir"], "killed")
            if epoch == 1 and not is_first and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ray_starts_workers_again_that_are_lost(tmp_path):
    pytest.importorskip("ray.train", reason="needs the extra `ray`")
    example = re.search(r"^```py\n(from pathlib.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    program = tmp_path / "program.py"
    text = example.replace("/shared/logs/vae", str(tmp_path / "run"))
    text = text.replace("import vae", "import mlp as vae").replace("recipes.vae", "recipes.mlp")
    text = text.replace('"multi_worker", ', '"multi_worker", data=looplab.Data("digits"), epochs=3, verbose=0, ')
    text = text.replace("RunConfig(", f"RunConfig(storage_path={str(tmp_path / 'ray')!r}, ")
    text = text.replace("checkpoint=saved)\n", f"checkpoint=saved){KILL}").replace(
        "import keras", "import os, signal, keras"
    )
    program.write_text(
        f"import ray\nray.init(num_cpus=2, include_dashboard=False)\n{text.rstrip()[:-6]}\nprint(.fit())"
    )
    program.write_text(
        program.read_text()
        .replace("\nTensorflowTrainer(", "\nresult = TensorflowTrainer(")
        .replace("\nprint(.fit())", ".fit()\nprint(result.metrics['loss'], result.error)")
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(program)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "run" / "killed").exists()
    history = json.loads((tmp_path / "run" / "history.json").read_text())["loss"]
    assert len(history) == 3
    assert f"{history[-1]} None" in ended.stdout
    steps, _ = read_scalars(tmp_path / "run" / "train")["batch_loss"]
    assert steps.tolist() == [*range(1, len(steps) + 1)]
