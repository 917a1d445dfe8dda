import keras
import pytest
import tensorflow as tf

from looplab.loop.engine import Engine
from looplab.loop.objective import Objective
from looplab.loop.step import StepRunner
from looplab.state import RunState
from looplab.summaries.folder import RunFolder
from looplab.variables import Variables
from looplab.warn import Warnings
from looplab.workers import Workers


class Bare:
    """The least that the loop needs of a trainer: one weight, trained to output the mean of x."""

    log_dir = None
    jit_compile = run_eagerly = False
    steps_per_execution = "auto"
    skip_nonfinite = 0
    stop_training = False
    history = None

    def __init__(self, optimizer=None, loss=None, metrics=None, log_dir=None):
        warnings = Warnings()
        objective = Objective(None, {"optimizer": optimizer, "loss": loss, "metrics": metrics}, warnings)
        runner = StepRunner(
            self, objective, Variables(self, {"metrics": objective.compiled}), warnings, tf.distribute.get_strategy()
        )
        self._looplab = Engine(runner, RunState(seed=0), RunFolder(log_dir), True, Workers(runner.strategy))
        self.model = None
        self.optimizer = objective.optimizer
        self.weight = tf.Variable(0.0)
        self.seen = keras.metrics.Sum("seen")

    @property
    def engine(self):
        return self._looplab

    @property
    def runner(self):
        return self._looplab.runner

    @property
    def trainable_variables(self):
        return self.runner.variables.trainable()

    @property
    def metrics(self):
        return self.runner.variables.metrics()

    @property
    def optimizers(self):
        return self.runner.variables.optimizers()

    def reset_metrics(self):
        for metric in self.metrics:
            metric.reset_state()

    def train_step(self, x):
        """Adds one to the weight, if the loss is finite."""
        loss = tf.reduce_mean(x)
        self.runner.prepare(self.optimizer, [self.weight])
        self.runner.guard.apply(self.optimizer, [tf.constant(-1.0)], [self.weight], loss, tf.shape(x)[0])
        self.seen.update_state(x)
        return {"loss": loss, "seen": self.seen.result()}

    def test_step(self, x):
        self.seen.update_state(x)
        return {"loss": tf.reduce_mean(x) - self.weight, "seen": self.seen.result()}

    def predict_step(self, x):
        return 2 * x


@pytest.fixture
def bare():
    """Creates a bare trainer, or one of a subclass of its class."""

    def create(kind=Bare, optimizer=None, **options):
        return kind(optimizer or keras.optimizers.SGD(1.0), **options)

    create.kind = Bare
    return create
