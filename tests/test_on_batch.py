"""`train_on_batch`, `test_on_batch` and `predict_on_batch` compute what Keras computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

pytestmark = pytest.mark.usefixtures("no_graph_rewrites")
L = keras.layers
N, BATCH = 40, 8
random = np.random.default_rng(0)
x, y, y2 = (random.normal(size=(N, n)).astype("float32") for n in (4, 1, 2))
labels = random.integers(0, 3, N)
w, w2 = random.uniform(0.1, 3, (2, N)).astype("float32")
classes = {0: 0.2, 1: 1.0, 2: 5.0}


@pytest.fixture(autouse=True)
def _full_precision():
    yield
    keras.config.set_dtype_policy("float32")


def start():
    """Makes what is created next start from the same seeds and names."""
    policy = keras.config.dtype_policy()
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)


def one(**options):
    """A compiled model with one output."""
    start()
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, "tanh"), L.Dense(1, dtype="float32")])
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", "metrics": ["mae"], **options})
    return model


def two(**options):
    """A compiled model with two outputs."""
    start()
    given = keras.Input((4,))
    hidden = L.Dense(3, "tanh")(given)
    model = keras.Model(given, [L.Dense(1, name="b")(hidden), L.Dense(2, name="a")(hidden)])
    settings = {"loss": ["mse", "mae"], "loss_weights": [0.3, 2.0], "metrics": [["mae"], ["mse"]]}
    settings["weighted_metrics"] = [["mse"], ["mse", "mae"]]
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), **settings, **options})
    return model


def classifier(**options):
    """A compiled classifier with state and random numbers."""
    start()
    layers = L.Dense(5, "tanh"), L.BatchNormalization(), L.Dropout(0.3), L.Dense(3, "softmax")
    model = keras.Sequential([keras.Input((4,)), *layers])
    settings = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
    settings["weighted_metrics"] = ["sparse_categorical_crossentropy"]
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1), **settings, **options})
    return model


class Adversaries(keras.Model):
    """A GAN as published, with two optimizers and trackers of its own."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), L.Dense(4, "tanh"), L.Dense(4)])
        self.critic = keras.Sequential([keras.Input((4,)), L.Dense(4, "tanh"), L.Dropout(0.2), L.Dense(1)])
        self.seed_generator = keras.random.SeedGenerator(7)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("d_loss", "g_loss")}

    def compile(self, **options):
        super().compile(**options)
        self.d_optimizer, self.g_optimizer = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02)
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    @property
    def metrics(self):
        return list(self.trackers.values())

    def train_step(self, batch):
        real = batch[0] if isinstance(batch, tuple) else batch
        fake = self.generator(keras.random.normal((tf.shape(real)[0], 2), seed=self.seed_generator))
        both, targets = tf.concat([real, fake], 0), tf.concat([tf.ones_like(real), tf.zeros_like(fake)], 0)[:, :1]
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(targets, self.critic(both, training=True))
        variables = self.critic.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, variables), variables, strict=True))
        with tf.GradientTape() as tape:
            fake = self.generator(keras.random.normal((tf.shape(real)[0], 2), seed=self.seed_generator))
            g_loss = self.loss_fn(tf.ones_like(fake)[:, :1], self.critic(fake, training=True))
        variables = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, variables), variables, strict=True))
        for name, loss in {"d_loss": d_loss, "g_loss": g_loss}.items():
            self.trackers[name].update_state(loss)
        return {name: tracker.result() for name, tracker in self.trackers.items()}


def adversaries(**options):
    start()
    model = Adversaries()
    model.compile(**options)
    return model


def ema():
    return one(optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2))


def half():
    keras.config.set_dtype_policy("mixed_float16")
    return one()


ROWS = {  # a model, and the arguments of its steps besides x, for the examples from a to b
    "one": (one, lambda a, b: {"y": y[a:b]}),
    "weights": (one, lambda a, b: {"y": y[a:b], "sample_weight": w[a:b]}),
    "run_eagerly": (lambda: one(run_eagerly=True), lambda a, b: {"y": y[a:b]}),
    "use_ema": (ema, lambda a, b: {"y": y[a:b]}),
    "mixed_float16": (half, lambda a, b: {"y": y[a:b]}),
    "two": (two, lambda a, b: {"y": [y[a:b], y2[a:b]]}),
    "two, weights": (two, lambda a, b: {"y": [y[a:b], y2[a:b]], "sample_weight": [w[a:b], w2[a:b]]}),
    "classes": (classifier, lambda a, b: {"y": labels[a:b]}),
    "class weights": (classifier, lambda a, b: {"y": labels[a:b], "class_weight": classes}),
    "some class weights": (classifier, lambda a, b: {"y": labels[a:b], "class_weight": classes if a % 3 else None}),
    "two optimizers": (adversaries, lambda a, b: {}),
}
SIZES = 8, 3, 1, 8, 13


def pair(make):
    """A Keras model and a trainer of an equal one."""
    return make(), looplab.Trainer(make())


def assert_same_weights(model, trainer, exact=True):
    for mine, weight in zip(trainer.get_weights(), model.weights, strict=True):
        np.testing.assert_allclose(mine, weight.numpy(), *((0, 0) if exact else (1e-5, 1e-6)), err_msg=weight.path)


def assert_same(ours, theirs, rtol=1e-5):
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol, 1e-6, err_msg=name)


@pytest.mark.parametrize("name", ROWS)
def test_steps_on_batches_of_any_size_compute_what_keras_computes(name):
    make, data = ROWS[name]
    model, trainer = pair(make)
    first = 0
    for size in SIZES:
        part = data(first, first + size)
        model.reset_metrics()  # Keras returns running values, looplab those of the batch
        theirs = model.train_on_batch(x[first : first + size], **part, return_dict=True)
        assert_same(trainer.train_on_batch(x[first : first + size], **part, return_dict=True), theirs)
        first += size
    # Keras's class weights reach the loss through another multiplication.
    assert_same_weights(model, trainer, exact="class weights" not in name)
    assert trainer.steps == len(SIZES)
    if make is not adversaries:
        part = {name: value for name, value in data(0, 9).items() if name != "class_weight"}
        model.reset_metrics()
        theirs = model.test_on_batch(x[:9], **part, return_dict=True)
        assert_same(trainer.test_on_batch(x[:9], **part, return_dict=True), theirs)
        model.reset_metrics()
        in_order = trainer.test_on_batch(x[:9], **part, return_dict=False)
        np.testing.assert_allclose(in_order, model.test_on_batch(x[:9], **part), 1e-5)
        tf.nest.map_structure(
            lambda mine, theirs: np.testing.assert_allclose(mine, theirs, 1e-6),
            list(trainer.predict_on_batch(x[:3])),
            list(model.predict_on_batch(x[:3])),
        )


def test_one_value_is_a_number_if_no_dict_is_asked_for():
    trainer = looplab.Trainer(one(metrics=None))
    assert isinstance(trainer.train_on_batch(x, y, return_dict=False), float)


def test_a_test_and_a_prediction_change_nothing():
    trainer = looplab.Trainer(classifier())
    trainer.train_on_batch(x, labels)
    weights, result = trainer.get_weights(), trainer.get_metrics_result()
    trainer.test_on_batch(x[:7], labels[:7])
    trainer.predict_on_batch(x[:5])
    assert all(map(np.array_equal, trainer.get_weights(), weights))
    assert trainer.get_metrics_result() == result
    assert trainer.steps == 1


def test_fit_and_single_steps_alternate_as_in_keras():
    model, trainer = pair(one)
    for _ in range(2):
        for first in (0, 8, 16):
            model.reset_metrics()
            theirs = model.train_on_batch(x[first : first + 8], y[first : first + 8], return_dict=True)
            assert_same(trainer.train_on_batch(x[first : first + 8], y[first : first + 8], return_dict=True), theirs)
        options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "validation_data": (x, y), "verbose": 0}
        assert_same(trainer.fit(x, y, **options).history, model.fit(x, y, **options).history)
        assert_same(trainer.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0, return_dict=True))
    assert_same_weights(model, trainer)
    assert (trainer.steps, trainer.epochs) == (26, 4)


def test_a_model_serves_two_trainers():
    """Each with its own loss and optimizer; Keras recompiles in between."""
    model, shared = one(metrics=None), one(metrics=None)
    first = looplab.Trainer(shared)
    second = looplab.Trainer(shared, loss="mae", optimizer=keras.optimizers.SGD(0.1))
    compiled = [(model.optimizer, "mse"), (keras.optimizers.SGD(0.1), "mae")]
    for _ in range(3):
        for trainer, (optimizer, loss) in zip((first, second), compiled, strict=True):
            model.compile(optimizer=optimizer, loss=loss)
            assert_same(trainer.train_on_batch(x, y, return_dict=True), model.train_on_batch(x, y, return_dict=True))
    assert_same_weights(model, first)


def test_each_of_two_devices_gets_the_whole_batch(two_devices):
    expected = looplab.Trainer(one())
    start()
    with two_devices.scope():
        layers = L.Dense(3, "tanh"), L.Dense(1)
        model = keras.Sequential([keras.Input((4,)), *layers])
        trainer = looplab.Trainer(model, optimizer=keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
    for each in (expected, trainer):
        each.set_weights([np.full(weight.shape, 0.5, "float32") for weight in each.weights])
    for size in (8, 3):
        assert_same(
            trainer.train_on_batch(x[:size], y[:size], return_dict=True),
            expected.train_on_batch(x[:size], y[:size], return_dict=True),
        )
    assert_same(
        trainer.test_on_batch(x[:3], y[:3], return_dict=True), expected.test_on_batch(x[:3], y[:3], return_dict=True)
    )
    np.testing.assert_allclose(trainer.predict_on_batch(x[:3]), expected.predict_on_batch(x[:3]), 1e-5)
