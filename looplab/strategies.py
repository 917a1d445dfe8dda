"""Which strategies of `tf.distribute` a trainer supports, and what it needs of them."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from looplab.variables import path_of
from looplab.walk import VARIABLES, Held
from looplab.warn import say
from looplab.workers import number_of_workers, rank_of

_DISTRIBUTING = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.TPUStrategy,
    tf.distribute.experimental.TPUStrategy,
)


def running() -> tf.distribute.Strategy:
    """The strategy in whose scope this is called.

    Raises:
        ValueError: No trainer can use it, or TF_CONFIG is that of one of several workers.
    """
    strategy = tf.distribute.get_strategy()
    if tf.distribute.has_strategy() and not isinstance(strategy, (tf.distribute.OneDeviceStrategy, *_DISTRIBUTING)):
        raise ValueError(
            f"`{_name(strategy)}` is not supported: create the trainer in the scope of a "
            f"`tf.distribute.MirroredStrategy`, or without a strategy."
        )
    is_alone = not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if is_alone and (workers := _in_environment()) > 1:
        raise ValueError(
            f"The environment variable TF_CONFIG names {workers} workers, and each of them would train alone. Create "
            f"the trainer in the scope of a `tf.distribute.MultiWorkerMirroredStrategy`, run a recipe with "
            f'`strategy="multi_worker"`, or unset TF_CONFIG.'
        )
    return strategy


def create(name: str) -> tf.distribute.Strategy:
    """A strategy, in a process in which TensorFlow has not run anything yet.

    Args:
        name: "none": the one in whose scope this is called; "mirrored": all devices of this machine; "multi_worker":
            those of all processes that TF_CONFIG names, or that Slurm has started in a job step.

    Raises:
        ValueError: The name is another one, or nothing names the workers.
    """
    if name == "none":
        return running()
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name != "multi_worker":
        raise ValueError(f'`strategy` must be "none", "mirrored" or "multi_worker"; got {name!r}.')
    if not _in_environment() and "SLURM_STEP_NODELIST" not in os.environ:
        raise ValueError(
            '`strategy` "multi_worker" needs the addresses of all workers: name them as "worker" in the cluster of '
            "TF_CONFIG, or start them with Slurm's `srun`."
        )
    try:
        return _of_workers()
    except ValueError as error:
        raise _malformed(error) from error


@functools.cache
def _of_workers() -> tf.distribute.Strategy:
    """The strategy of this process, which TensorFlow connects with the others once."""
    resolver = _resolver()
    spec = resolver.cluster_spec()
    if rank_of(resolver) == 0:
        addresses = [address for job in spec.jobs for address in spec.job_tasks(job)]
        say(f"looplab: {number_of_workers(spec)} workers: waiting for all of them ({', '.join(addresses)}).")
    return tf.distribute.MultiWorkerMirroredStrategy(resolver)


def _resolver() -> tf.distribute.cluster_resolver.ClusterResolver:
    """What knows the addresses of the workers."""
    if os.environ.get("TF_CONFIG"):
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    by_slurm = functools.partial(tf.distribute.cluster_resolver.SlurmClusterResolver, port_base=_slurm_port())
    if shutil.which("nvidia-smi") and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return by_slurm()  # gives each worker of a node GPUs of its own
    # Slurm has done so, or there are none, for which TensorFlow fails to count the workers of a node.
    return by_slurm(gpus_per_node=10**6, gpus_per_task=1, auto_set_gpu=False)


def _slurm_port() -> int:
    """The first port of a job, so that two jobs on one node rarely have the same."""
    return 20_000 + 16 * (int(os.environ.get("SLURM_JOB_ID", "0")) % 500)


def check(strategy: tf.distribute.Strategy, found: Iterable[Held], trains: bool, jit_compile: bool) -> None:
    """Requires that what a trainer holds can be used with its strategy.

    Args:
        strategy: That of the trainer.
        found: The stateful objects of the trainer.
        trains: Whether optimizers are used.
        jit_compile: Whether XLA compiles the steps.

    Raises:
        ValueError: Something was created in the scope of another strategy, or XLA or the accumulation of gradients
            would get several replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if jit_compile and replicas > 1:
        raise ValueError(
            f"`jit_compile` is True, which TensorFlow supports on one device only; the trainer has {replicas}. Pass "
            f"`jit_compile=False` to the trainer, or to the model's `compile`."
        )
    owner = strategy if isinstance(strategy, _DISTRIBUTING) else None
    for held in found:
        for variable in _changed_variables(held.thing):
            whole = variable.value if isinstance(variable, keras.Variable) else variable
            created_in = getattr(whole, "distribute_strategy", None)
            if created_in is not owner:
                raise ValueError(
                    f"`{held.path}` was created {_scope(created_in)}, and the trainer {_scope(owner)}: see the "
                    f"variable {path_of(variable)}. Create models, optimizers, metrics and the trainer in one "
                    f"`with strategy.scope():` block."
                )
        optimizer = getattr(held.thing, "inner_optimizer", held.thing)
        steps = getattr(optimizer, "gradient_accumulation_steps", None)
        if trains and steps and replicas > 1 and isinstance(optimizer, keras.Optimizer):
            raise ValueError(
                f"`gradient_accumulation_steps` of `{held.path}` is {steps}, which Keras supports on one device only; "
                f"the trainer has {replicas}. Use a larger batch, or train on one device."
            )


def _changed_variables(thing: Any) -> list[Any]:
    """What training changes of a stateful object."""
    if isinstance(thing, VARIABLES):
        return [thing] if thing.trainable else []
    if isinstance(thing, (keras.Optimizer, keras.Metric)):
        return list(thing.variables)
    return list(getattr(thing, "trainable_variables", []))


def _in_environment() -> int:
    """How many workers TF_CONFIG names, if this process is one of them."""
    if not os.environ.get("TF_CONFIG"):
        return 0
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        spec, task = resolver.cluster_spec(), resolver.task_type
    except (AttributeError, TypeError, ValueError) as error:
        raise _malformed(error) from error
    return 0 if task == "evaluator" else number_of_workers(spec)  # which is alone by design


def _malformed(error: Exception) -> ValueError:
    name = "The environment variable TF_CONFIG" if os.environ.get("TF_CONFIG") else "What Slurm says of its job step"
    return ValueError(f"{name} is malformed: {str(error).rstrip('.')}. Correct or unset it.")


def _scope(strategy: tf.distribute.Strategy | None) -> str:
    if strategy is None:
        return "outside of any strategy's scope"
    replicas = strategy.num_replicas_in_sync
    return f"in the scope of a `{_name(strategy)}` of {replicas} replica{'' if replicas == 1 else 's'}"


def _name(strategy: tf.distribute.Strategy) -> str:
    """Its public name: those of classes may differ."""
    names = [*vars(tf.distribute).items(), *vars(tf.distribute.experimental).items()]
    return next((name for name, kind in names if type(strategy) is kind), type(strategy).__name__)
