"""When a step is traced again."""

import keras
import pytest
import tensorflow as tf

from looplab.loop.compiled import Compiled
from looplab.loop.predictor import Predictor
from looplab.loop.tracing import Tracer

SPEC, OTHER = tf.TensorSpec((None,), tf.float32), tf.TensorSpec((4,), tf.float32)


@pytest.fixture
def trainer(bare):
    return bare()


@pytest.fixture
def tracer(trainer):
    return Tracer(trainer.runner)


def test_each_kind_and_signature_is_traced_once(tracer):
    assert not tracer.is_built
    train = tracer.compiled("train", SPEC)
    assert tracer.is_built
    assert isinstance(train, Compiled)
    assert tracer.compiled("train", SPEC) is train
    assert tracer.compiled("train", OTHER) is not train
    assert tracer.compiled("train", SPEC) is train
    assert isinstance(tracer.compiled("predict", SPEC), Predictor)
    assert tracer.compiled("test", SPEC).copies.pairs  # it only reads
    assert not train.copies.pairs
    assert tracer.compiled("train", SPEC, eagerly=True).eager


@pytest.mark.parametrize("change", ["optimizer", "rate", "frozen", "loss", "jit_compile"])
def test_what_a_step_depends_on_makes_it_trace_again(trainer, tracer, change):
    trainer.layer = keras.layers.BatchNormalization(center=False, scale=False)  # has no weight to freeze
    trainer.layer.build((None, 1))
    before = tracer.compiled("test", SPEC)
    assert tracer.compiled("test", SPEC) is before
    if change == "optimizer":
        trainer.optimizer = keras.optimizers.SGD()
    elif change == "rate":
        trainer.optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5)
    elif change == "frozen":
        trainer.layer.trainable = False
    elif change == "loss":
        trainer.runner.objective.loss = "mae"
    else:
        trainer.jit_compile = True
    assert tracer.compiled("test", SPEC) is not before


def replaced_optimizer(trainer):
    trainer.optimizer = keras.optimizers.SGD()


def replaced_rate(trainer):
    trainer.optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5)


def replaced_item(trainer):
    trainer.parts["layers"][0] = keras.layers.Dense(1)


def replaced_optimizer_of_a_model(trainer):
    trainer.model.own_optimizer = keras.optimizers.SGD()


def added_layer(trainer):
    trainer.stack.add(keras.layers.Dense(1))


def frozen_layer(trainer):
    trainer.parts["layers"][1].trainable = False


def frozen_variable(trainer):
    trainer.bias.trainable = False


def eagerly(trainer):
    trainer.run_eagerly = True


CHANGES = [replaced_optimizer, replaced_rate, replaced_item, replaced_optimizer_of_a_model, added_layer, frozen_layer]


@pytest.mark.parametrize("change", [*CHANGES, frozen_variable, eagerly])
def test_a_single_step_sees_what_has_changed_since_the_last_one(trainer, tracer, change):
    class Model(keras.Model):
        own_optimizer = None

    trainer.model, trainer.stack = Model(), keras.Sequential([keras.layers.Dense(1)])
    trainer.model.own_optimizer = keras.optimizers.Adam()
    trainer.parts = {"layers": [keras.layers.Dense(1), keras.layers.BatchNormalization()]}
    trainer.bias = keras.Variable(0.0)
    before = tracer.recent("test", SPEC)
    trainer.memory, trainer.note = [(1, 2)], "nothing that a step depends on"
    assert tracer.recent("test", SPEC) is before
    change(trainer)
    assert tracer.recent("test", SPEC) is not before


def test_warns_of_the_third_signature(tracer):
    for shape in (1,), (2,):
        tracer.compiled("predict", tf.TensorSpec(shape, tf.float32))
    with pytest.warns(
        UserWarning, match=r"`predict_step` is traced for the third time.*`x` was \(2,\) float32, and is"
    ):
        tracer.compiled("predict", tf.TensorSpec((3,), tf.float32))


def test_a_failed_trace_leaves_nothing(bare):
    class Failing(bare.kind):
        fails = True

        def train_step(self, x):
            if self.fails:
                raise ZeroDivisionError
            return super().train_step(x)

    trainer = bare(Failing)
    tracer = Tracer(trainer.runner)
    with pytest.raises(ZeroDivisionError):
        tracer.compiled("train", SPEC)
    assert not tracer.is_built
    trainer.fails = False
    tracer.compiled("train", SPEC)
    assert tracer.is_built


def test_a_step_that_is_a_function_of_tensorflow_is_traced_by_looplab(bare):
    class Wrapped(bare.kind):
        train_step = tf.function(bare.kind.train_step)

    trainer = bare(Wrapped)
    assert Tracer(trainer.runner).compiled("train", SPEC).names == ["learning_rate", "loss", "seen"]


def test_finds_what_nothing_leads_to(bare, tmp_path):
    class Hidden(bare.kind):
        def train_step(self, x):
            noise = keras.random.normal((1,))
            return {**super().train_step(x), "noise": noise[0] + tf.random.uniform(())}

    trainer = bare(Hidden)
    trainer.log_dir = tmp_path
    Tracer(trainer.runner).compiled("train", SPEC)
    assert len(trainer.runner.variables.strays()) == 1
    with pytest.warns(UserWarning, match=r"no checkpoint can restore \(RandomUniform\)"):
        trainer.runner.warnings.give()
