"""Layers that users write after the Keras guides, each inside `Trainer.fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import looplab
from looplab.testing import read_scalars

SGD = keras.optimizers.SGD


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def size(trainer):
    return sum(weight.size for weight in trainer.get_weights())


# A layer that takes targets and logits, and is loss and metric at once.


class LogisticEndpoint(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        self.accuracy = keras.metrics.BinaryAccuracy("accuracy", threshold=0)

    def call(self, targets, logits, sample_weight=None):
        self.add_loss(self.cross_entropy(targets, logits, sample_weight))
        self.accuracy.update_state(targets, logits, sample_weight)
        return ops.sigmoid(logits)


@pytest.mark.parametrize("weighed", [False, True])
def test_logistic_endpoint_brings_its_loss_and_accuracy(weighed, tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 3)).astype("float32")
    targets = (x @ random.normal(size=(3, 10)) + random.normal(size=(50, 10)) > 0).astype("float32")
    weight = random.uniform(0, 2, 50).astype("float32") if weighed else np.ones(50, "float32")
    data = {"inputs": x, "targets": targets} | ({"weight": weight} if weighed else {})
    inputs = {name: layers.Input(value.shape[1:], name=name) for name, value in data.items()}
    logits = layers.Dense(10)(inputs["inputs"])
    outputs = LogisticEndpoint(name="endpoint")(inputs["targets"], logits, inputs.get("weight"))
    trainer = looplab.Trainer(keras.Model(inputs, outputs), optimizer=SGD(1.0), log_dir=tmp_path / "run")
    assert size(trainer) == 40

    def expected(kernel, bias):
        probability = sigmoid(x @ kernel + bias)
        losses = -np.log(np.where(targets == 1, probability, 1 - probability)).mean(1)
        accuracy = keras.metrics.BinaryAccuracy(threshold=0)
        accuracy.update_state(targets, x @ kernel + bias, weight)
        return {"loss": np.mean(losses * weight), "accuracy": float(accuracy.result())}, probability

    kernel, bias = trainer.get_weights()
    values, probability = expected(kernel, bias)
    history = trainer.fit(data, batch_size=50, verbose=0).history
    assert set(history) == {"loss", "accuracy"}
    assert history["loss"] == [pytest.approx(values["loss"], rel=1e-5)]
    assert history["accuracy"] == [pytest.approx(values["accuracy"], rel=1e-6)]
    gradient = (probability - targets) * weight[:, None] / 500
    for got, hand in zip(trainer.get_weights(), [kernel - x.T @ gradient, bias - gradient.sum(0)], strict=True):
        np.testing.assert_allclose(got, hand, atol=1e-6)

    fit = {"batch_size": 16, "epochs": 20, "validation_data": data, "validation_freq": 20}
    history = trainer.fit(data, verbose=0, **fit).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert history["accuracy"][-1] > history["accuracy"][0]
    points = read_scalars(tmp_path / "run" / "train")
    np.testing.assert_array_equal(points["batch_accuracy"][0], np.arange(1, 82))
    if not weighed:  # each point is of its batch alone
        mean = np.average(points["batch_accuracy"][1][1:5], weights=[16, 16, 16, 2])
        assert history["accuracy"][0] == pytest.approx(mean, rel=1e-6)
    values, probability = expected(*trainer.get_weights())
    for results in (trainer.evaluate(data, batch_size=16), {name: history[f"val_{name}"][-1] for name in values}):
        assert {name: results[name] for name in values} == pytest.approx(values, rel=1e-5)
    np.testing.assert_allclose(trainer.predict(data, batch_size=16), probability, atol=1e-6)


# Weights, made in every way.


class LinearOfVariables(layers.Layer):
    def __init__(self, units, input_dim, make=keras.Variable, **options):
        super().__init__(**options)
        self.w = make(np.random.default_rng(0).normal(size=(input_dim, units)).astype("float32"), trainable=True)
        self.b = make(np.zeros(units, "float32"), trainable=True)

    def call(self, x):
        return ops.matmul(x, self.w) + self.b


class LinearOfDict(layers.Layer):
    """Holds variables where not even the attributes of the layer show them."""

    def __init__(self, units, input_dim):
        super().__init__()
        self.make = lambda: {"w": tf.Variable(tf.ones((input_dim, units))), "b": tf.Variable(tf.zeros(units))}
        self.parts = None

    def call(self, x):
        self.parts = self.parts or self.make()
        return x @ self.parts["w"] + self.parts["b"]


class EagerLinear(layers.Layer):
    def __init__(self, units, input_dim):
        super().__init__()
        self.w = self.add_weight(shape=(input_dim, units), initializer="random_normal", trainable=True)
        self.b = self.add_weight(shape=(units,), initializer="zeros", trainable=True)

    def call(self, x):
        return ops.matmul(x, self.w) + self.b


class Linear(layers.Layer):
    def __init__(self, units=32, **options):
        super().__init__(**options)
        self.units = units

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1], self.units), initializer="random_normal", trainable=True)
        self.b = self.add_weight(shape=(self.units,), initializer="zeros", trainable=True)

    def call(self, x):
        return ops.matmul(x, self.w) + self.b

    def get_config(self):
        return {**super().get_config(), "units": self.units}


LINEARS = {
    "keras.Variable": lambda: LinearOfVariables(1, 4),
    "add_weight in __init__": lambda: EagerLinear(1, 4),
    "add_weight in build": lambda: Linear(1),
    "tf.Variable in a model": lambda: keras.Sequential([LinearOfVariables(1, 4, tf.Variable)]),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear_learns_however_its_weights_are_made(name, line, tmp_path):
    x, y = line

    def trainer_of_new():
        return looplab.Trainer(LINEARS[name](), optimizer=SGD(0.1), loss="mse")

    trainer = trainer_of_new()
    trainer.build(x, y)
    w, b = trainer.get_weights()
    assert (w.shape, b.shape) == ((4, 1), (1,))
    history = trainer.fit(x, y, batch_size=100, verbose=0).history
    error = x @ w + b - y
    assert history["loss"] == [pytest.approx(np.mean(error**2), rel=1e-5)]
    for got, hand in zip(trainer.get_weights(), [w - 0.002 * x.T @ error, b - 0.2 * error.mean(0)], strict=True):
        np.testing.assert_allclose(got, hand, atol=1e-6)
    assert trainer.fit(x, y, epochs=15, verbose=0).history["loss"][-1] < 0.05

    trainer.save_weights(tmp_path / "linear.weights.h5")
    again = trainer_of_new()
    again.build(x, y)
    again.load_weights(tmp_path / "linear.weights.h5")
    for got, expected in zip(again.get_weights(), trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_tf_variables_that_no_attribute_leads_to_are_trained(line):
    trainer = looplab.Trainer(keras.Sequential([LinearOfDict(1, 4)]), optimizer=SGD(0.1), loss="mse")
    assert trainer.fit(*line, epochs=15, verbose=0).history["loss"][-1] < 0.05
    assert size(trainer) == 5


def test_tf_variables_of_layers_of_one_name_are_saved_apart(line, tmp_path):
    def trainer_of_new():
        blocks = [keras.Sequential([LinearOfVariables(units, 4, tf.Variable, name="same")]) for units in (4, 1)]
        return looplab.Trainer(keras.Sequential(blocks), optimizer=SGD(0.01), loss="mse")

    trainer, again = trainer_of_new(), trainer_of_new()
    trainer.fit(*line, verbose=0)
    trainer.save_weights(tmp_path / "same.weights.h5")
    again.build(*line)
    again.load_weights(tmp_path / "same.weights.h5")
    for got, expected in zip(again.get_weights(), trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


class ComputeSum(layers.Layer):
    def __init__(self, input_dim):
        super().__init__(name="sum")
        self.make_total(input_dim)

    def make_total(self, input_dim):
        self.total = self.add_weight(shape=(input_dim,), initializer="zeros", trainable=False)

    def call(self, x):
        self.total.assign_add(ops.sum(x, axis=0))
        return self.total


class ComputeSumOfTensorFlow(ComputeSum):
    def make_total(self, input_dim):
        self.total = tf.Variable(tf.zeros(input_dim), trainable=False)


class DensePlusSum(keras.Model):
    def __init__(self, compute_sum):
        super().__init__()
        self.sum = compute_sum(2)
        self.dense = layers.Dense(2, kernel_initializer="zeros", use_bias=False)

    def call(self, x):
        return self.dense(x) + self.sum(x)


@pytest.mark.parametrize(
    ("compute_sum", "options"),
    [(ComputeSum, {"steps_per_execution": 2}), (ComputeSumOfTensorFlow, {"run_eagerly": True})],
    ids=["add_weight", "tf.Variable"],
)
def test_compute_sum_keeps_its_state_from_step_to_step(compute_sum, options, tmp_path):
    class Telling(looplab.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            for index in range(2):
                self.log(f"total_{index}", self.model.sum.total[index])
            return logs

    def new(**more):
        return Telling(DensePlusSum(compute_sum), optimizer=SGD(0.1), loss="mse", **options, **more)

    x, y = np.ones((4, 2), "float32"), np.zeros((4, 2), "float32")
    trainer = new(log_dir=tmp_path / "run")
    trainer.fit(x, y, batch_size=2, verbose=0, validation_data=(x, y))
    points = read_scalars(tmp_path / "run" / "train")
    for index in range(2):
        np.testing.assert_array_equal(points[f"batch_total_{index}"][1], [2, 4])
    assert points["batch_loss"][1][0] == 4
    np.testing.assert_array_equal(trainer.model.sum.total, [4, 4])
    kernel = trainer.model.dense.kernel.numpy()
    np.testing.assert_allclose(trainer.predict(x[:2]), x[:2] @ kernel + 6, rtol=1e-6)
    np.testing.assert_array_equal(trainer.model.sum.total, [4, 4])

    trainer.save_weights(tmp_path / "sum.weights.h5")
    again = new()
    again.build(x, y)
    again.load_weights(tmp_path / "sum.weights.h5")
    np.testing.assert_array_equal(again.model.sum.total, [4, 4])


class MLPBlock(layers.Layer):
    def __init__(self):
        super().__init__()
        self.linears = [Linear(32), Linear(32), Linear(1)]

    def call(self, x):
        for linear in self.linears[:-1]:
            x = ops.relu(linear(x))
        return self.linears[-1](x)


def test_mlp_block_of_linears_trains_as_in_keras():
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 64)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    fit = {"batch_size": 16, "epochs": 3, "shuffle": False, "verbose": 0}
    trainer = looplab.Trainer(MLPBlock(), optimizer=SGD(0.1), loss="mse")
    assert trainer.get_weights() == []
    trainer.build(x, y)
    start = trainer.get_weights()
    assert len(start) == 6
    assert size(trainer) == 3169
    history = trainer.fit(x, y, **fit).history

    model = keras.Sequential([MLPBlock()])
    model.build((None, 64))
    model.set_weights(start)
    model.compile(optimizer=SGD(0.1), loss="mse")
    np.testing.assert_allclose(history["loss"], model.fit(x, y, **fit).history["loss"], rtol=1e-5)
    for got, expected, before in zip(trainer.get_weights(), model.get_weights(), start, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert not np.array_equal(got, before)


# Losses of layers.


class ActivityRegularization(layers.Layer):
    def __init__(self, rate=1e-2):
        super().__init__(name="activity")
        self.rate = rate

    def call(self, x):
        self.add_loss(self.rate * ops.sum(x))
        return x


class Outer(layers.Layer):
    def __init__(self, name="outer"):
        super().__init__(name=name)
        self.activity = ActivityRegularization()

    def call(self, x):
        return self.activity(x)


def test_activity_regularization_in_an_outer_layer_is_learnt_from(line, tmp_path):
    x, y = line
    model = keras.Sequential([layers.Dense(1, use_bias=False), Outer()])
    trainer = looplab.Trainer(model, optimizer=SGD(0.1), loss="mse", log_dir=tmp_path / "run")
    trainer.build(x, y)
    (kernel,) = trainer.get_weights()
    history = trainer.fit(x, y, batch_size=100, verbose=0).history
    added, error = 1e-2 * np.sum(x @ kernel), x @ kernel - y
    parts = {tag: values for tag, (_, values) in read_scalars(tmp_path / "run" / "train").items()}
    (added_part,) = {tag for tag in parts if tag.startswith("epoch_") and tag.endswith("outer/activity")}
    assert parts[added_part] == [pytest.approx(added, rel=1e-4)]
    assert parts["epoch_loss/mse"] == [pytest.approx(np.mean(error**2), rel=1e-5)]
    assert history["loss"] == [pytest.approx(np.mean(error**2) + added, rel=1e-5)]
    hand = kernel - 0.1 * (0.02 * x.T @ error + 0.01 * x.sum(0)[:, None])
    np.testing.assert_allclose(trainer.get_weights()[0], hand, atol=1e-6)
    assert added_part.replace("epoch_", "batch_") in parts


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_each_call_of_a_layer_adds_one_loss(run_eagerly):
    class Counting(looplab.Trainer):
        def train_step(self, batch):
            self.log("trainer_before", len(self.losses))
            for call in (1, 2):
                self(batch, training=True)
                self.log(f"layer_{call}", len(self.model.losses))
                self.log(f"trainer_{call}", len(self.losses))
            return {"loss": tf.add_n(self.losses)}

    outer, x = Outer(), np.ones((4, 3), "float32")
    assert outer.losses == []
    for _ in range(2):
        outer(ops.zeros((2, 2)))
        assert len(outer.losses) == 1
    history = Counting(outer, run_eagerly=run_eagerly).fit(x, batch_size=2, epochs=2, verbose=0).history
    counts = {"trainer_before": 0, "layer_1": 1, "trainer_1": 1, "layer_2": 1, "trainer_2": 2}
    assert {name: history[name] for name in counts} == {name: [count] * 2 for name, count in counts.items()}
    assert history["loss"] == pytest.approx([0.12, 0.12])


@pytest.mark.parametrize("loss", [None, "mse"])
def test_activity_regularization_alone_is_counted_and_there_is_nothing_to_train(loss):
    x = np.arange(12, dtype="float32").reshape(4, 3)
    inputs = layers.Input((3,))
    trainer = looplab.Trainer(keras.Model(inputs, ActivityRegularization()(inputs)), optimizer="adam", loss=loss)
    with pytest.warns(UserWarning, match="Trainer has nothing to train: no trainable variables") as warned:
        history = trainer.fit(x, x + 1, batch_size=2, epochs=3, verbose=0).history
    assert len(warned) == 1
    total = 0.33 + (loss == "mse")
    assert history["loss"] == pytest.approx([total] * 3, rel=1e-6)
    assert trainer.evaluate(x, x + 1, batch_size=2)["loss"] == pytest.approx(total, rel=1e-6)
    np.testing.assert_array_equal(trainer.predict(x), x)
    assert trainer.get_weights() == []


class OuterWithL2(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(32, kernel_regularizer=keras.regularizers.L2(1e-3))

    def call(self, x):
        return self.dense(x)


def test_l2_is_one_part_of_the_loss_and_shrinks_the_kernel(line, tmp_path):
    x, _ = line
    y = np.ones((100, 32), "float32")
    trainer = looplab.Trainer(OuterWithL2(), optimizer=SGD(0.5), loss="mse", log_dir=tmp_path / "run")
    trainer.build(x, y)
    kernel, bias = trainer.get_weights()
    history = trainer.fit(x, y, batch_size=100, verbose=0).history
    error, penalty = x @ kernel + bias - y, 1e-3 * np.sum(kernel**2)
    parts = read_scalars(tmp_path / "run" / "train")
    assert set(history) == {"loss"}
    assert parts["epoch_loss/regularization"][1] == [pytest.approx(penalty, rel=1e-5)]
    assert parts["epoch_loss/mse"][1] == [pytest.approx(np.mean(error**2), rel=1e-5)]
    assert history["loss"] == [pytest.approx(np.mean(error**2) + penalty, rel=1e-5)]
    gradients = x.T @ error / 1600 + 2e-3 * kernel, error.sum(0) / 1600
    for got, before, gradient in zip(trainer.get_weights(), (kernel, bias), gradients, strict=True):
        np.testing.assert_allclose(got, before - 0.5 * gradient, atol=1e-6)
    kernel, bias = trainer.get_weights()
    expected = np.mean((x @ kernel + bias - y) ** 2) + 1e-3 * np.sum(kernel**2)
    assert trainer.evaluate(x, y, batch_size=30) == {"loss": pytest.approx(expected, rel=1e-5)}


# Configurations.


class Scaled(layers.Layer):
    """Its constructor takes a layer, which `from_config` has to make first."""

    def __init__(self, inner, scale, **options):
        super().__init__(**options)
        self.inner, self.scale = inner, scale

    def call(self, x):
        return self.inner(x) * self.scale

    def get_config(self):
        return {**super().get_config(), "inner": self.inner.get_config(), "scale": self.scale}

    @classmethod
    def from_config(cls, config):
        return cls(Linear.from_config(config.pop("inner")), **config)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: Linear(1, name="mine", dtype="float64"), "float64"),
        (lambda: Scaled(Linear(1, dtype="bfloat16"), 0.5, name="mine", dtype="bfloat16"), "bfloat16"),
    ],
    ids=["from_config", "overridden from_config"],
)
def test_a_layer_rebuilt_from_its_config_trains_on(make, dtype, line):
    x, y = line
    layer = make()
    trainer = looplab.Trainer(layer, optimizer=SGD(0.1), loss="mse")
    fit = {"epochs": 3, "shuffle": False, "verbose": 0}
    first = trainer.fit(x, y, **fit).history["loss"]
    again = type(layer).from_config(layer.get_config())
    assert again is not layer
    assert again.name == "mine"
    assert again.get_config() == layer.get_config()
    other = looplab.Trainer(again, optimizer=SGD(0.1), loss="mse")
    other.build(x, y)
    other.set_weights(trainer.get_weights())
    assert {str(thing.dtype) for thing in (*other.get_weights(), other.predict(x))} == {dtype}
    histories = [each.fit(x, y, **fit).history["loss"] for each in (trainer, other)]
    np.testing.assert_array_equal(*histories)
    assert histories[1][-1] < first[-1] < first[0]


# Calls that depend on `training` and on masks.


class CustomDropout(layers.Layer):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, x, training=None):
        return keras.random.dropout(x, self.rate, seed=self.seed_generator) if training else x


class WithoutTrainingArgument(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def functional(parts):
    x = inputs = layers.Input((16,))
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("make", [functional, WithoutTrainingArgument])
def test_custom_dropout_is_active_in_training_alone(make):
    class Telling(looplab.Trainer):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return {"kept": tf.reduce_mean(y_pred) / 2}

    x = np.ones((96, 16), "float32")
    model = make([CustomDropout(0.5), layers.Dense(16, kernel_initializer="identity", use_bias=False)])
    trainer = Telling(model, optimizer=SGD(1e-30), loss="mse")  # no weight is that exact
    kept = []
    collect = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: kept.append(logs["kept"]))
    data = {"batch_size": 32, "verbose": 0}
    history = trainer.fit(x, x, epochs=2, callbacks=[collect], validation_data=(x, x), **data).history
    assert history["loss"] == [1, 1]  # each number became 0 or 2
    assert history["val_loss"] == [0, 0]
    assert len(set(kept)) > 3
    assert np.mean(kept) == pytest.approx(0.5, abs=0.05)
    assert trainer.evaluate(x, x, **data)["loss"] == 0
    np.testing.assert_array_equal(trainer.predict(x), x)


class MaskByHand(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(10, 4, mask_zero=True)
        self.rnn = layers.SimpleRNN(3)

    def call(self, x):
        return self.rnn(self.embedding(x), mask=self.embedding.compute_mask(x))


def tokens(random):
    return random.integers(1, 10, (6, 5))


def signals(random):
    return random.normal(size=(6, 5, 4)).astype("float32")


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: keras.Sequential([layers.Embedding(10, 4, mask_zero=True), layers.LSTM(3)]), tokens),
        (lambda: keras.Sequential([layers.Masking(), layers.SimpleRNN(3)]), signals),
        (MaskByHand, tokens),
    ],
    ids=["Embedding", "Masking", "mask by hand"],
)
def test_an_rnn_obeys_masks(make, data):
    x, y = data(np.random.default_rng(0)), np.ones((6, 3), "float32")
    padded = np.concatenate([x, np.zeros_like(x[:, :3])], 1)
    model = make()
    trainer = looplab.Trainer(model, optimizer=SGD(0.5), loss="mse")
    trainer.build(padded, y)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    gradients = map(tf.convert_to_tensor, tape.gradient(loss, model.weights))
    expected = [weight - 0.5 * gradient for weight, gradient in zip(model.weights, gradients, strict=True)]
    history = trainer.fit(padded, y, verbose=0).history
    assert history["loss"] == [pytest.approx(float(loss), rel=1e-5)]
    for got, hand in zip(trainer.get_weights(), expected, strict=True):
        np.testing.assert_allclose(got, hand, atol=1e-6)

    padded[3:, 2:] = 0  # several lengths within a batch
    outputs = trainer.predict(padded)
    np.testing.assert_allclose(outputs[:3], model(x[:3]), atol=1e-6)
    np.testing.assert_allclose(outputs[3:], model(x[3:, :2]), atol=1e-6)
    first, rnn = model.layers
    assert np.abs(outputs - rnn(first(padded).numpy())).min() > 1e-3  # what ignoring the mask would give


# Frozen layers.


@pytest.mark.parametrize(
    "make",
    [
        lambda: [layers.Dense(4), layers.BatchNormalization()],
        lambda: [LinearOfVariables(4, 4, tf.Variable)],
        lambda: [LinearOfDict(4, 4)],
    ],
    ids=["Keras layers", "tf.Variables", "tf.Variables in a dict"],
)
def test_frozen_layers_stay_to_the_bit_until_unfrozen(make, line):
    x, y = line
    base = keras.Sequential(make())
    trainer = looplab.Trainer(keras.Sequential([base, layers.Dense(1, name="head")]), loss="mse")
    for trainable in (False, True, False):
        base.trainable = trainable
        trainer.optimizer = SGD(0.01)
        trainer.build(x, y)
        before = trainer.get_weights()
        trainer.fit(x, y, verbose=0)
        assert trainer.optimizer.iterations == 4
        changed = {w.shape: not np.array_equal(w, b) for w, b in zip(trainer.get_weights(), before, strict=True)}
        assert changed == {(4, 4): trainable, (4,): trainable, (4, 1): True, (1,): True}
