"""Resumes from the checkpoint of each single step of a run of three epochs.

By default from every seventh; with LOOPLAB_FAULTS set, from each.
"""

import shutil

import pytest
from runs import FAULTS, NETS, Outcome, check_same, checkpoints, write_history


@pytest.mark.parametrize("net", NETS)
def test_a_run_resumes_from_any_step_to_the_same_bits(net, tmp_path):
    def run(log_dir):
        trainer, arguments = NETS[net](log_dir, every=1, keep=1000)
        write_history(log_dir, trainer.fit(**arguments, resume=True, verbose=0).history)

    whole = tmp_path / "whole"
    run(whole)
    expected = Outcome.of(whole)
    saved = checkpoints(whole)
    assert [steps for steps, _ in saved[:-1]] == list(range(1, expected.newest[0] + 1))
    for steps, epochs in saved if FAULTS else saved[6::7]:
        log_dir = tmp_path / f"from-{steps}-{epochs}"
        shutil.copytree(whole, log_dir, ignore=shutil.ignore_patterns("checkpoints", "history.json"))
        name = f"checkpoints/step-{steps}-epoch-{epochs}"
        shutil.copytree(whole / name, log_dir / name)
        run(log_dir)
        check_same(log_dir, expected)
