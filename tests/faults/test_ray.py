"""The README's example for Ray: it starts two workers, and starts them again when one is killed."""

import json
import os
import re
import subprocess
import sys

import pytest

from looplab.testing import read_scalars
from tests.test_docs import README, ROOT

KILL = """
            if epoch == 1 and not is_first and not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), 9)
"""
SMALLER = {  # than the README's example, and a worker is killed once
    "/shared/logs/vae": "{folder}/run",
    "from looplab.recipes.vae import vae": "from looplab.recipes.mlp import mlp as vae",
    'strategy="multi_worker",': 'strategy="multi_worker", data=looplab.Data("digits"), epochs=3, verbose=0,',
    "/shared/ray": "{folder}/ray",
    "checkpoint=saved)\n": f"checkpoint=saved){KILL}".replace('Path("killed")', 'Path("{folder}/killed")'),
    "TensorflowTrainer(\n": "result = TensorflowTrainer(\n",
}


def test_ray_starts_workers_again_that_are_lost(tmp_path):
    pytest.importorskip("ray.train", reason="needs the extra `ray`")
    example = re.search(r"^```py\n(import ray.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    for text, changed in SMALLER.items():
        assert example.count(text) == 1, text
        example = example.replace(text, changed.replace("{folder}", str(tmp_path)))
    program = tmp_path / "program.py"
    program.write_text(
        f"import os\nfrom pathlib import Path\n\nimport ray\n\nray.init(num_cpus=2, include_dashboard=False)\n{example}"
        "assert result.error is None\nprint('reported', result.metrics['loss'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 500}
    ended = subprocess.run([sys.executable, str(program)], check=False, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    history = json.loads((tmp_path / "run" / "history.json").read_text())["loss"]
    assert len(history) == 3
    assert f"reported {history[-1]}" in ended.stdout
    steps, _ = read_scalars(tmp_path / "run" / "train")["batch_loss"]
    assert steps.tolist() == [*range(1, len(steps) + 1)]
