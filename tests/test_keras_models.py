"""Keras models as they are: what they are compiled with, their own steps, their files, and Keras's names and limits."""

import functools
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

pytestmark = pytest.mark.usefixtures("no_graph_rewrites")
L = keras.layers
N, BATCH = 20, 8  # the last batch is smaller
random = np.random.default_rng(0)
x, y, y2 = (random.normal(size=(N, n)).astype("float32") for n in (4, 1, 2))
labels = random.integers(0, 3, N)
w, w2 = random.uniform(0.1, 3, (2, N)).astype("float32")


@pytest.fixture(autouse=True)
def _no_settings():
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


def start():
    """Makes what is created next start from the same seeds and names."""
    policy = keras.config.dtype_policy()
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)


def one():
    start()
    return keras.Sequential([keras.Input((4,)), L.Dense(3, "tanh", name="hidden"), L.Dense(1, dtype="float32")])


def two():
    start()
    given = keras.Input((4,))
    hidden = L.Dense(3, "tanh")(given)
    return keras.Model(given, [L.Dense(1, name="b")(hidden), L.Dense(2, name="a")(hidden)])


def compiled(make=one, **options):
    model = make()
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", "jit_compile": False, **options})
    return model


def fitted(trainer, target=y, **options):
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, **options}
    return trainer.fit(x, target, **options).history


def assert_same(ours, theirs, rtol=1e-5):
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol, 1e-6, err_msg=name)


def assert_same_weights(trainer, model):
    for mine, weight in zip(trainer.get_weights(), model.weights, strict=True):
        np.testing.assert_array_equal(mine, weight.numpy(), err_msg=weight.path)


# What a model is compiled with.

OPTIONS = {
    "metrics": (one, lambda: {"metrics": ["mae", keras.metrics.R2Score()]}, y, None),
    "weighted_metrics": (one, lambda: {"metrics": ["mae"], "weighted_metrics": ["mse"]}, y, w),
    "loss_weights": (two, lambda: {"loss": ["mse", "mae"], "loss_weights": [0.3, 2.0]}, [y, y2], [w, w2]),
    "of two outputs": (
        two,
        lambda: {"loss": ["mse", "mae"], "metrics": [["mae"], None], "weighted_metrics": [["mse"], ["mse", "mae"]]},
        [y, y2],
        [w, w2],
    ),
    "run_eagerly": (one, lambda: {"metrics": ["mae"], "run_eagerly": True}, y, w),
    "steps_per_execution": (one, lambda: {"metrics": ["mae"], "steps_per_execution": 2}, y, None),
    "use_ema": (one, lambda: {"optimizer": keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5)}, y, None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_compiled_model_trains_as_in_keras(name):
    make, options, target, weight = OPTIONS[name]
    model, mine = compiled(make, **options()), compiled(make, **options())
    trainer = looplab.Trainer(mine)
    assert trainer.run_eagerly == (name == "run_eagerly")
    assert trainer.steps_per_execution == (2 if name == "steps_per_execution" else "auto")
    theirs, ours = (fitted(one, target, sample_weight=weight) for one in (model, trainer))
    of_outputs = {"a_loss", "b_loss"}  # Keras averages them over batches, of which the last is smaller
    assert_same(*({n: value for n, value in logs.items() if n not in of_outputs} for logs in (ours, theirs)))
    assert_same_weights(trainer, model)
    values = [one.evaluate(x, target, sample_weight=weight, verbose=0, return_dict=True) for one in (trainer, model)]
    assert_same(*values)
    in_order = [one.evaluate(x, target, sample_weight=weight, verbose=0, return_dict=False) for one in (trainer, model)]
    np.testing.assert_allclose(*in_order, 1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "mae"},
        {"optimizer": "sgd"},
        {"metrics": ["mse"]},
        {"weighted_metrics": ["mse"]},
        {"loss_weights": [0.5]},
        {"optimizer": "sgd", "loss": "mae", "metrics": []},
    ],
    ids=str,
)
def test_arguments_of_a_trainer_take_precedence(given):
    trainer = looplab.Trainer(compiled(metrics=["mae"]), **given)
    model = compiled(**{"metrics": ["mae"], **given})
    theirs, ours = (fitted(one, sample_weight=w) for one in (model, trainer))
    assert_same(ours, theirs)
    assert_same_weights(trainer, model)


def test_settings_of_a_trainer_take_precedence():
    model = compiled(steps_per_execution=3, run_eagerly=True)
    trainer = looplab.Trainer(model, steps_per_execution=2, run_eagerly=False)
    assert (trainer.steps_per_execution, trainer.run_eagerly, trainer.jit_compile) == (2, False, False)
    assert looplab.Trainer(compiled(jit_compile=True)).jit_compile
    assert not looplab.Trainer(compiled(jit_compile=True), jit_compile=False).jit_compile


def test_auto_is_no_xla_and_other_settings_are_errors():
    trainer = looplab.Trainer(compiled(jit_compile=True), jit_compile="auto")
    assert trainer.jit_compile is False
    trainer.jit_compile = np.True_
    for name, value in (("jit_compile", "no"), ("run_eagerly", 1), ("steps_per_execution", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be .*; got {value!r}"):
            setattr(trainer, name, value)
    assert (trainer.jit_compile, trainer.run_eagerly, trainer.steps_per_execution) == (True, False, "auto")


def test_settings_follow_when_the_model_is_compiled_again():
    settings = {"run_eagerly": True, "steps_per_execution": 3}
    model = compiled()
    trainer, given = looplab.Trainer(model), looplab.Trainer(model, run_eagerly=False, steps_per_execution=2)
    own = looplab.Trainer(model, loss="mae", optimizer="sgd")
    fitted(trainer)
    for each in (settings, {"jit_compile": True}, {}):
        model.compile("sgd", "mse", **{"jit_compile": False, **each})
        for one in (trainer, own):
            assert one.run_eagerly == each.get("run_eagerly", False)
            assert one.steps_per_execution == each.get("steps_per_execution", "auto")
            assert one.jit_compile == each.get("jit_compile", False)
        assert (given.run_eagerly, given.steps_per_execution) == (False, 2)
    trainer.run_eagerly = True
    model.compile("sgd", "mse")
    assert trainer.run_eagerly


@pytest.mark.parametrize("in_fit", [True, False])
def test_the_next_step_runs_eagerly_if_the_model_was_compiled_so(in_fit):
    model, seen = one(), []
    model.add(L.Lambda(lambda values: seen.append(tf.executing_eagerly()) or values))
    trainer = looplab.Trainer(model)
    for is_eager in (False, True, False):
        model.compile("sgd", "mse", run_eagerly=is_eager, jit_compile=False)
        seen.clear()
        fitted(trainer, epochs=1) if in_fit else trainer.train_on_batch(x, y)
        assert {*seen} == {is_eager}


def test_a_resumed_fit_follows_the_model_later(tmp_path):
    trainer = looplab.Trainer(compiled(), log_dir=tmp_path)
    fitted(trainer, epochs=1)
    trainer = looplab.Trainer(compiled(run_eagerly=True), log_dir=tmp_path)
    fitted(trainer, resume=True)
    assert trainer.run_eagerly
    trainer.model.compile("sgd", "mse")
    assert not trainer.run_eagerly


@pytest.mark.parametrize(
    ("of_model", "of_trainer", "scales"),
    [
        ({}, {}, True),
        ({"auto_scale_loss": False}, {}, False),
        ({"auto_scale_loss": False}, {"loss": "mae"}, False),
        ({"auto_scale_loss": False}, {"auto_scale_loss": True}, True),
        ({}, {"auto_scale_loss": False}, True),  # as in Keras, it wraps no optimizer, and unwraps none
    ],
)
def test_auto_scale_loss(of_model, of_trainer, scales):
    keras.config.set_dtype_policy("mixed_float16")
    trainer, model = looplab.Trainer(compiled(**of_model), **of_trainer), compiled(**of_model)
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer) == scales
    if of_trainer:
        model.compile(**{"optimizer": model.optimizer, "loss": "mse", **of_model, **of_trainer})
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == scales
    trainer = looplab.Trainer(one(), optimizer="adam", loss="mse", **of_model)
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer) == (not of_model)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_model_may_be_compiled_once_its_trainer_was_created(is_compiled):
    model, mine = one(), one()
    if is_compiled:
        for each in (model, mine):
            each.compile(loss="mape")
    trainer = looplab.Trainer(mine)
    if is_compiled:
        assert_same(fitted(trainer), fitted(model))
    settings = [("mse", keras.optimizers.SGD), ("mae", keras.optimizers.Adam)]
    for loss, optimizer in settings:
        for each in (model, mine):
            each.compile(optimizer=optimizer(0.01), loss=loss, metrics=["mae"], weighted_metrics=["mse"])
        theirs, ours = (fitted(each, sample_weight=w) for each in (model, trainer))
        assert_same(ours, theirs)
        assert trainer.optimizer is mine.optimizer
    assert_same_weights(trainer, model)


def test_a_file_of_the_model_keeps_what_it_was_compiled_with_and_its_optimizer(tmp_path):
    model, trainer = compiled(metrics=["mae"]), looplab.Trainer(compiled(metrics=["mae"]))
    fitted(model), fitted(trainer)
    trainer.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == 6
    assert_same(fitted(loaded), fitted(model))
    assert_same_weights(looplab.Trainer(loaded), model)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_file_of_the_trainer_is_compiled_as_it_is_and_leaves_the_model_as_it_was(tmp_path, is_compiled, policy):
    keras.config.set_dtype_policy(policy)
    options = {"loss": "mae", "metrics": ["mse"]}
    mine = compiled(loss="mape", run_eagerly=True) if is_compiled else one()
    trainer = looplab.Trainer(mine, optimizer=keras.optimizers.Adam(0.01), **options)
    model = compiled(**options, run_eagerly=is_compiled)
    fitted(trainer, epochs=1), fitted(model, epochs=1)
    before = dict(vars(mine))
    trainer.save(tmp_path / "model.keras")
    assert vars(mine) == before
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(fitted(loaded), fitted(model))
    assert_same(fitted(trainer), model.history.history)
    trainer.optimizer = keras.optimizers.SGD(0.25)
    trainer.save(tmp_path / "model.keras")
    assert float(keras.saving.load_model(tmp_path / "model.keras").optimizer.learning_rate) == 0.25


def test_a_file_lacks_what_keras_cannot_write(tmp_path):
    trainer = looplab.Trainer(one(), optimizer="adam", loss=functools.partial(keras.losses.huber, delta=0.5))
    fitted(trainer, epochs=1)
    with pytest.warns(UserWarning, match=r"`save` writes the model without its optimizer.*functools.partial"):
        trainer.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.compiled
    assert not trainer.model.compiled
    assert_same_weights(trainer, loaded)


# A model's own step.


class Distance(keras.Model):
    """A model with a step, an optimizer and a tracker of its own, and one that averages its weights."""

    def __init__(self):
        super().__init__()
        self.inner = L.Dense(1)
        self.dropout = L.Dropout(0.3)
        self.head = L.Dense(1, use_bias=False)
        self.tracker = keras.metrics.Mean(name="distance")

    def compile(self, head_optimizer, **options):
        super().compile(jit_compile=False, **options)
        self.head_optimizer = head_optimizer

    def call(self, given, training=False):
        return self.head(self.dropout(self.inner(given), training=training))

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, batch):
        given, target = batch[:2]
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean((self(given, training=True) - target) ** 2)
        for part, optimizer in ((self.inner, self.optimizer), (self.head, self.head_optimizer)):
            optimizer.apply(tape.gradient(loss, part.trainable_weights), part.trainable_weights)
        self.tracker.update_state(loss)
        return {"distance": self.tracker.result()}


def distance(**options):
    start()
    model = Distance()
    model.compile(
        optimizer=keras.optimizers.Adam(0.01, **options),
        head_optimizer=keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    )
    return model


def test_a_step_of_its_own_uses_its_own_optimizers(tmp_path):
    trainer, model = looplab.Trainer(distance(), log_dir=tmp_path), distance()
    theirs = [fitted(model, batch_size=10) for _ in range(2)]
    assert_same(fitted(trainer, batch_size=10), theirs[0])
    assert_same(fitted(trainer, batch_size=10), theirs[1])
    assert_same_weights(trainer, model)
    assert {*trainer.optimizers} == {"optimizer", "model/head_optimizer"}
    curves = looplab.read_scalars(tmp_path / "train")
    rates = curves["batch_learning_rate/model/head_optimizer"][1]
    np.testing.assert_allclose(rates, 0.1 * 0.5 ** (np.arange(8) / 2), 1e-6)
    np.testing.assert_allclose(curves["batch_learning_rate"][1], 8 * [0.01], 1e-6)


def test_each_optimizer_inside_one_has_a_curve_of_its_own(tmp_path):
    parts = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {"unused/.*": keras.optimizers.SGD(0.2)})
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.MultiOptimizer(parts), "mse")
    fitted(looplab.Trainer(model, log_dir=tmp_path))
    curves = looplab.read_scalars(tmp_path / "train")
    rates = [{*values.tolist()} for tag, (_, values) in curves.items() if "learning_rate/optimizer/" in tag]
    assert sorted(map(list, rates)) == [[np.float32(0.1)], [np.float32(0.2)]]


def test_pickling_a_trainer_or_its_history_says_what_to_do_instead():
    trainer = looplab.Trainer(compiled())
    fitted(trainer)
    for one in (trainer, trainer.history):
        with pytest.raises(TypeError, match="`Trainer` cannot be pickled or copied: use its `save`"):
            pickle.dumps(one)
    assert pickle.loads(pickle.dumps(trainer.history.history)) == trainer.history.history


class Branching(keras.Model):
    """Its step depends on a tensor."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(1)

    def call(self, given):
        return self.dense(given)

    def train_step(self, batch):
        given, target = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(given) - target) ** 2)
            if loss > 1.0:
                loss = tf.sqrt(loss)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_its_step_may_branch_on_tensors_as_that_of_a_trainer():
    def weights(of, **options):
        start()
        model = Branching()
        model.compile(keras.optimizers.SGD(0.1), "mse", **options)
        of(model).fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        return model.get_weights()

    expected = weights(lambda model: model, run_eagerly=True)
    for one, other in zip(weights(looplab.Trainer), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


class ByHand(keras.Model):
    """Its step calls `update_step` itself, twice, or trains the rate together with the weights."""

    def __init__(self, trains_rate):
        super().__init__()
        self.dense, self.trains_rate = L.Dense(1), trains_rate

    def call(self, given):
        return self.dense(given)

    def train_step(self, batch):
        given, target = batch
        optimizer, (kernel, bias) = self.optimizer, self.trainable_variables
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(given) - target) ** 2)
            gradients = tape.gradient(loss, [kernel, bias])
            if self.trains_rate:
                gradients.insert(1, tf.constant(0.1))
                optimizer.apply(gradients, [kernel, optimizer.learning_rate, bias])
                continue
            for gradient, variable in zip(gradients, (kernel, bias), strict=True):
                optimizer.update_step(gradient, variable.value, optimizer.learning_rate)
            optimizer.iterations.assign_add(1)
        return {"loss": loss}


@pytest.mark.parametrize("trains_rate", [False, True])
def test_updates_that_a_step_makes_itself_use_the_counter_and_the_rate_of_then(trains_rate):
    def weights(of, **options):
        start()
        model = ByHand(trains_rate)
        model(x)
        optimizer = keras.optimizers.SGD(0.3) if trains_rate else keras.optimizers.Adam(0.1)
        optimizer.build([model.weights[0], optimizer.learning_rate, model.weights[1]][:: 1 if trains_rate else 2])
        model.compile(optimizer, "mse", jit_compile=False)
        of(model, **options).fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        return model.get_weights()

    expected = weights(lambda model: model)
    for eager in (False, True):
        for one, other in zip(weights(looplab.Trainer, run_eagerly=eager), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_averages_of_its_optimizer_become_its_weights_at_the_end_as_in_keras():
    options = {"use_ema": True, "ema_momentum": 0.9}
    trainer, model = looplab.Trainer(distance(**options)), distance(**options)
    fitted(trainer), fitted(model)
    assert_same_weights(trainer, model)


def test_its_training_resumes_to_the_same_bits():
    def build(**options):
        return looplab.Recipe(looplab.Trainer(distance(), **options), (x, y), epochs=2, batch_size=BATCH)

    looplab.testing.assert_resume_exact(build, steps=2)


# Files.


def test_a_model_whose_states_are_no_weights_is_saved_as_keras_saves_it(tmp_path):
    def stateful():
        start()
        return keras.Sequential([keras.Input((4, 1), batch_size=5), L.LSTM(2, stateful=True), L.Dense(1)])

    trainer, model = looplab.Trainer(compiled(stateful)), compiled(stateful)
    trainer.train_on_batch(x[:5, :, None], y[:5])
    trainer.save(tmp_path / "model.keras")
    trainer.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(trainer, model)
    assert keras.saving.load_model(tmp_path / "model.keras").compiled
