"""`Trainer` computes what `keras.Model.fit` and `evaluate` compute: losses, metrics, weights, and what callbacks see.

Keras runs eagerly here. For a few steps that is faster than a trace, and only there does it know the size of a batch:
in a graph, the loss that it reports for each of several outputs is wrong where the last batch is smaller.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")  # where an output has no loss
L, C = keras.layers, keras.callbacks
N, T, BATCH = 20, 5, 8  # the last batch is smaller
random = np.random.default_rng(0)


def normal(*shape):
    return random.normal(size=shape).astype("float32")


def positive(*shape):
    return random.uniform(0.1, 3, size=shape).astype("float32")


x, y, y2, y3 = normal(N, 4), normal(N, 1), normal(N, 1), normal(N, 2)
series, y_series = normal(N, T, 3), normal(N, T, 1)
series[:12, 3:] = 0  # the steps that `Masking` hides
words = np.where(np.arange(T) < random.integers(1, T + 1, size=(N, 1)), random.integers(1, 9, size=(N, T)), 0)
labels, tags = random.integers(0, 3, size=N), random.integers(0, 3, size=(N, T))
one_hot, binary = np.eye(3, dtype="float32")[labels], (labels > 0).astype("float32")[:, None]
w, w2, w_series = positive(N), positive(N), positive(N, T)
validation, w_validation = (normal(11, 4), normal(11, 1)), positive(11)
named_y = {"b": y2, "a": y}


def batches(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(BATCH)


# Models.


def network(*layers, inputs=(4,), dtype="float32"):
    given = keras.Input(inputs, dtype=dtype)
    return keras.Model(given, functools.reduce(lambda value, layer: layer(value), layers, given))


def one():
    return network(L.Dense(3, "tanh"), L.Dense(1, name="a"))


def classes():
    return network(L.Dense(3, "softmax", name="a"))


def two_classes():
    return network(L.Dense(1, "sigmoid", name="a"))


def outputs(pack):
    """A model whose outputs a, b and c this function packs."""
    given = keras.Input((4,))
    hidden = L.Dense(3, "tanh")(given)
    return keras.Model(given, pack(*(L.Dense(n, name=name)(hidden) for name, n in zip("abc", (1, 1, 2), strict=True))))


def two():
    return outputs(lambda a, b, c: [a, b])


def three():
    return outputs(lambda a, b, c: (a, b, c))


def named():
    return outputs(lambda a, b, c: {"b": b, "a": a})


def nested():
    return outputs(lambda a, b, c: {"first": a, "rest": [b, c]})


def two_inputs():
    given = {"p": keras.Input((4,), name="p"), "q": keras.Input((1,), name="q")}
    return keras.Model(given, L.Dense(1)(L.Concatenate()([given["p"], given["q"]])))


class Sum(L.Layer):
    """Adds up its inputs, of which the second one may be missing."""

    def call(self, values, more=None):
        return values if more is None else values + more


def optional():
    given = {"x": keras.Input((4,), name="x"), "more": keras.Input((4,), name="more", optional=True)}
    return keras.Model(given, L.Dense(1)(Sum()(given["x"], given["more"])))


def per_step():
    return network(L.SimpleRNN(3, return_sequences=True), L.Dense(1), inputs=(T, 3))


def masked():
    return network(L.Masking(), L.LSTM(3), L.Dense(1), inputs=(T, 3))


def masked_per_step():
    return network(L.Masking(), L.GRU(3, return_sequences=True), L.Dense(1), inputs=(T, 3))


def tagger():
    layers = L.Embedding(9, 3, mask_zero=True), L.SimpleRNN(3, return_sequences=True), L.Dense(3, "softmax")
    return network(*layers, inputs=(T,), dtype="int32")


class Watched(L.Layer):
    """Adds two losses in each call, and owns a metric."""

    def __init__(self):
        super().__init__()
        self.magnitude = keras.metrics.Mean(name="magnitude")

    def call(self, values):
        self.magnitude.update_state(tf.abs(values))
        self.add_loss(0.1 * tf.reduce_mean(values**2))
        self.add_loss(0.1 * tf.abs(values))
        return values


def watched():
    return network(L.Dense(3), Watched(), L.Dense(1))


def regularized():
    return network(L.Dense(3, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.1)), L.Dense(1))


def normalized():
    return network(L.Dense(3), L.BatchNormalization(), L.GaussianNoise(0.5, seed=3), L.Dropout(0.5, seed=4), L.Dense(1))


def frozen():
    model = network(L.Dense(3), L.BatchNormalization(), L.Dense(1))
    model.layers[1].trainable = model.layers[2].trainable = False
    return model


def of_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return network(L.Dense(3), L.Dense(1, dtype="float32"))
    finally:
        keras.config.set_dtype_policy(before)


# Losses and metrics.


def distance(y_true, y_pred):
    return sum(tf.reduce_mean(tf.abs(a - b), -1) for a, b in zip(y_true, y_pred, strict=True))


def cubed(y_true, y_pred):
    return tf.abs(y_true - y_pred) ** 3


class Most(keras.Metric):
    """A metric whose result is a dict."""

    most = None

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.most = self.add_weight(name="most", initializer="zeros") if self.most is None else self.most
        self.most.assign(tf.maximum(self.most, tf.reduce_max(tf.abs(y_pred))))

    def result(self):
        return {"most": self.most + 0.0, "twice": self.most * 2.0}


MSE = {"loss": "mse"}
MAE = {"loss": "mse", "metrics": ["mae"]}
MIXED = {"loss": ["mse", "mae"]}
SPARSE = {"loss": "sparse_categorical_crossentropy"}
SCORED = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def summed(**options):
    return {"loss": keras.losses.MeanSquaredError("sum"), "optimizer": keras.optimizers.SGD(0.01), **options}


def sgd(**options):
    return lambda: {"loss": "mse", "optimizer": keras.optimizers.SGD(**{"learning_rate": 0.1, **options})}


def adam(**options):
    return lambda: {"loss": "mse", "optimizer": keras.optimizers.Adam(0.03, **options)}


def several():
    one_each = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {"a/.*": keras.optimizers.Adam(0.03)})
    return {"loss": "mse", "optimizer": keras.optimizers.MultiOptimizer(one_each)}


class Decaying(keras.optimizers.SGD):
    """The rate decreases with each update of a variable, which uses the new one."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self._learning_rate, self._learning_rate * 0.9)
        self.assign_sub(variable, gradient * tf.cast(self._learning_rate, variable.dtype))


class Counting(keras.optimizers.SGD):
    """Counts the updates of variables, by which it divides them."""

    def update_step(self, gradient, variable, learning_rate):
        self.iterations.assign_add(1)
        self.assign_sub(variable, 0.1 * gradient / tf.cast(self.iterations, variable.dtype))


class Layerwise(keras.optimizers.SGD):
    """Each variable has a lower rate than the one before."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(gradient, variable.value, self.learning_rate)
            self.learning_rate.assign(self.learning_rate * 0.8)


class Scaling(keras.optimizers.SGD):
    """An update has an argument more, and returns what it subtracts."""

    def update_step(self, gradient, variable, learning_rate, scale=1.0):
        change = gradient * scale * learning_rate
        self.assign_sub(variable, change)
        return change

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        changes = [
            self.update_step(gradient, variable.value, learning_rate=learning_rate, scale=0.5)
            for gradient, variable in zip(grads, trainable_variables, strict=True)
        ]
        self.learning_rate.assign_add(tf.reduce_max(changes[-1]))


def own_optimizer(kind):
    return lambda: {"loss": "mse", "optimizer": kind(0.1)}


class Row(NamedTuple):
    """One comparison. Settings and options that hold state are functions, which are called for each of the two."""

    model: Callable[[], keras.Model]
    data: Any
    settings: Any = MSE
    fit: Any = None
    weight: Any = None
    rtol: float = 1e-5


ROWS = {
    # The loss and the metrics of one output.
    "loss, string": Row(one, (x, y), {"loss": "mae"}),
    "loss, object": Row(one, (x, y), lambda: {"loss": keras.losses.Huber(0.3)}),
    "loss, function": Row(one, (x, y), {"loss": cubed}),
    "loss, dict": Row(one, (x, y), {"loss": {"a": "mse"}, "metrics": {"a": ["mae", "mse"]}}),
    "loss, weighted": Row(one, (x, y), {"loss": "mse", "loss_weights": 0.3}),
    "loss, sum": Row(one, (x, y), summed),
    "loss, mean with weights": Row(
        one, (x, y), lambda: {"loss": keras.losses.MeanSquaredError("mean_with_sample_weight")}, weight=w
    ),
    "loss, from logits": Row(one, (x, binary), lambda: {"loss": keras.losses.BinaryCrossentropy(from_logits=True)}),
    "y without a column": Row(one, (x, y[:, 0]), MAE),
    "labels in a column": Row(classes, (x, labels[:, None]), {**SPARSE, "metrics": ["acc"]}),
    "metrics, several": Row(one, (x, y), lambda: {**MSE, "metrics": ["mae", "mae", cubed, keras.metrics.R2Score()]}),
    "metrics, dict as result": Row(one, (x, y), lambda: {**MSE, "metrics": [Most(), "mae"]}),
    "metrics of labels": Row(two_classes, (x, binary), {"loss": "binary_crossentropy", "metrics": ["accuracy", "AUC"]}),
    "metrics of one hot": Row(
        classes, (x, one_hot), lambda: {"loss": "kld", "metrics": ["accuracy", keras.metrics.F1Score("macro")]}
    ),
    "inputs, dict": Row(two_inputs, ({"q": y2, "p": x}, y)),
    # Several outputs.
    "two, one loss": Row(two, (x, [y, y2]), {"loss": "mse", "metrics": [["mae"], ["mse", "mae"]]}),
    "two, lists": Row(
        two, (x, [y, y2]), {"loss": ["mse", cubed], "loss_weights": [0.2, 3.0], "metrics": ["mae", "mae"]}
    ),
    "two, dicts": Row(two, (x, [y, y2]), {"loss": {"b": "mae", "a": "mse"}, "metrics": {"b": ["mae"]}}),
    "two, weights by name": Row(
        two, (x, [y, y2]), {"loss": {"a": "mse", "b": "mae"}, "loss_weights": {"b": 3.0, "a": 0.2}}
    ),
    "two, y in a tuple": Row(two, (x, (y, y2)), {**MIXED, "metrics": ["mae", None]}),
    "two, y in a dict": Row(two, (x, named_y), MIXED),
    "two, no loss for one": Row(two, (x, [y, y2]), {"loss": ["mse", None], "metrics": [None, ["mae"]]}),
    "two, no target for one": Row(two, (x, [y]), {"loss": ["mse", None]}),
    "three": Row(three, (x, (y, y2, y3)), {"loss": ["mse", "mae", cubed], "loss_weights": [1.0, 0.0, 2.0]}),
    "three, dataset": Row(three, batches(x, (y, y2, y3)), {"loss": "mse", "metrics": ["mae", None, "mae"]}),
    "named": Row(named, (x, named_y), {"loss": {"a": "mse", "b": "mae"}, "metrics": {"b": ["mse"]}}),
    "named, weights": Row(
        named, (x, named_y), {"loss": {"a": "mse", "b": "mae"}, "loss_weights": {"b": 2.0, "a": 0.3}}
    ),
    "named, one left out": Row(named, (x, named_y), {"loss": {"a": "mse"}, "metrics": {"a": ["mae"]}}),
    "nested": Row(nested, (x, {"first": y, "rest": [y2, y3]}), {"loss": {"first": "mse", "rest": ["mae", "mse"]}}),
    "pair as a whole and in parts": Row(
        two, (x, (y, y2)), {"loss": (distance, ["mse", "mae"]), "loss_weights": (0.5, [2.0, 0.25])}
    ),
    "optional input": Row(optional, ({"x": x, "more": None}, y)),
    # Weights of examples.
    "weights (n,)": Row(one, (x, y), MAE, weight=w),
    "weights, integers": Row(one, (x, y), weight=np.arange(N) % 4),
    "weights, sum": Row(one, (x, y), summed, weight=w),
    "weights (n, T)": Row(per_step, (series, y_series), weight=w_series),
    "weights (n, 1) for (n, T)": Row(per_step, (series, y_series), weight=w[:, None]),
    "weights, one for two outputs": Row(two, (x, [y, y2]), weight=w),
    "weights, list of one": Row(one, (x, [y]), MAE, weight=[w]),
    "weights, list": Row(two, (x, [y, y2]), MIXED, weight=[w, w2[:, None]]),
    "weights, none for one": Row(two, (x, [y, y2]), weight=[w, None]),
    "weights, dict": Row(named, (x, named_y), weight={"a": w, "b": w2}),
    "weights, dataset of two": Row(two, batches(x, (y, y2), (w, w2)), MIXED),
    "class weights": Row(classes, (x, labels), SCORED, {"class_weight": {0: 0.2, 1: 1.0, 2: 5.0}}),
    "class weights of one hot": Row(classes, (x, one_hot), {"loss": "kld"}, {"class_weight": {0: 0.2, 2: 5.0}}),
    "class weights in a column": Row(two_classes, (x, binary), fit={"class_weight": {0: 0.2, 1: 3}}),
    "class weights, dataset": Row(classes, batches(x, labels), SPARSE, {"class_weight": {0: 0.2, 1: 1.0, 2: 5.0}}),
    "class weights, validation": Row(classes, (x, labels), SPARSE, {"class_weight": {1: 4.0}, "validation_split": 0.3}),
    # Masks.
    "mask, Masking": Row(masked, (series, y), weight=w),
    "mask of outputs": Row(masked_per_step, (series, y_series), MAE),
    "mask of outputs, weights": Row(masked_per_step, (series, y_series), weight=w_series),
    "mask of labels": Row(tagger, (words, tags), SCORED),
    "mask of labels, weights": Row(tagger, (words, tags), SPARSE, weight=w_series),
    # Validation.
    "validation split": Row(one, (x, y), fit={"validation_split": 0.25}, weight=w),
    "validation data": Row(one, (x, y), MAE, {"validation_data": validation}),
    "validation weights": Row(one, (x, y), fit={"validation_data": (*validation, w_validation)}),
    "validation of two": Row(
        two, (x, [y, y2]), fit={"validation_data": (validation[0], [validation[1]] * 2, [w_validation, None])}
    ),
    "validation dataset": Row(one, (x, y), fit={"validation_data": batches(*validation)}),
    "validation freq": Row(one, (x, y), fit={"validation_data": validation, "validation_freq": 2, "epochs": 3}),
    "validation steps": Row(
        one, (x, y), fit={"validation_data": validation, "validation_steps": 2, "validation_batch_size": 4}
    ),
    # Optimizers. 16 bits are rounded at other places in a graph.
    "adam": Row(one, (x, y), {"loss": "mse", "optimizer": "adam"}),
    "ema": Row(one, (x, y), adam(use_ema=True, ema_momentum=0.5, weight_decay=0.1)),
    "ema, overwriting": Row(one, (x, y), adam(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)),
    "accumulation": Row(one, (x, y), adam(gradient_accumulation_steps=2)),
    "several optimizers": Row(one, (x, y), several),
    "clipnorm": Row(one, (x, y), sgd(clipnorm=0.1)),
    "global clipnorm": Row(one, (x, y), sgd(global_clipnorm=0.1)),
    "schedule": Row(one, (x, y), sgd(learning_rate=keras.optimizers.schedules.CosineDecay(0.3, 5))),
    "own optimizer, assigned rate": Row(one, (x, y), own_optimizer(Decaying)),
    "own optimizer, assigned counter": Row(one, (x, y), own_optimizer(Counting)),
    "own optimizer, rates of variables": Row(one, (x, y), own_optimizer(Layerwise)),
    "own optimizer, own arguments": Row(one, (x, y), own_optimizer(Scaling)),
    "float16": Row(functools.partial(of_policy, "mixed_float16"), (x, y), adam(), rtol=1e-2),
    "bfloat16": Row(functools.partial(of_policy, "mixed_bfloat16"), (x, y), adam(), rtol=5e-2),
    # Layers, epochs and callbacks.
    "add_loss": Row(watched, (x, y)),
    "add_loss alone": Row(watched, (x, None), {}),
    "regularizers": Row(regularized, (x, y), MAE, weight=w),
    "random layers": Row(normalized, (x, y)),
    "frozen layers": Row(frozen, (x, y)),
    "initial epoch": Row(one, (x, y), fit={"initial_epoch": 2, "epochs": 4}),
    "steps per epoch": Row(one, batches(x, y).repeat(), fit={"steps_per_epoch": 4}),
    "early stopping": Row(
        one,
        (x, y),
        sgd(momentum=0.99),
        lambda: {"epochs": 8, "validation_data": validation, "callbacks": C.EarlyStopping(restore_best_weights=True)},
    ),
    "plateau": Row(
        one, (x, y), sgd(), lambda: {"epochs": 5, "callbacks": C.ReduceLROnPlateau("loss", patience=1, min_delta=1)}
    ),
    "scheduler": Row(one, (x, y), fit=lambda: {"callbacks": C.LearningRateScheduler(lambda n, rate: rate / (n + 2))}),
}


def made(options):
    return options() if callable(options) else options or {}


def prepared(row, prepare):
    """`prepare(model, **settings)` with the same weights whenever it is called."""
    keras.utils.set_random_seed(1)
    return prepare(row.model(), **{"optimizer": keras.optimizers.SGD(0.1), **made(row.settings)})


def compiled(model, **settings):
    model.compile(**settings, run_eagerly=True)
    return model


def fitted(trainer, row, **options):
    """The history of a short training."""
    data = (row.data,) if isinstance(row.data, tf.data.Dataset) else row.data
    if len(data) == 2:
        options = {"batch_size": BATCH, "sample_weight": row.weight, **options}
    return trainer.fit(*data, **{"epochs": 2, "shuffle": False, "verbose": 0, **made(row.fit), **options})


def evaluated(trainer, row, **options):
    if isinstance(row.data, tf.data.Dataset):
        return trainer.evaluate(row.data, steps=3, verbose=0, **options)
    return trainer.evaluate(*row.data, batch_size=BATCH, sample_weight=row.weight, verbose=0, **options)


def assert_same(ours, theirs, rtol=1e-5):
    assert sorted(ours) == sorted(theirs)
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol, 1e-6, err_msg=name)


def compare(row, trainer, model):
    theirs, ours = fitted(model, row), fitted(trainer, row)
    assert_same(ours.history, theirs.history, row.rtol)
    assert ours.epoch == theirs.epoch
    for weight, mine in zip(model.weights, trainer.get_weights(), strict=True):
        np.testing.assert_allclose(mine, weight.numpy(), row.rtol, row.rtol, err_msg=weight.path)
    if row.fit is None:
        trainer.run_eagerly = True  # a trace takes long
        assert_same(evaluated(trainer, row), evaluated(model, row, return_dict=True), row.rtol)


@pytest.mark.parametrize("name", ROWS)
def test_trainer_computes_what_keras_computes(name):
    trainer, model = (prepared(ROWS[name], prepare) for prepare in (looplab.Trainer, compiled))
    # How structures match does not depend on a trace, which takes long.
    trainer.run_eagerly = name.startswith(("two", "named", "weights", "class weights"))
    compare(ROWS[name], trainer, model)


@pytest.mark.parametrize(
    ("row", "ours", "theirs"),
    [  # Keras aligns weights with the last axis, and classes with the last label of each example
        (Row(per_step, (series, y_series)), {"sample_weight": w}, {"sample_weight": w[:, None]}),
        (Row(tagger, (words, tags), SPARSE), {"sample_weight": w}, {"sample_weight": np.repeat(w[:, None], T, 1)}),
        (
            Row(tagger, (words, tags), SPARSE),
            {"class_weight": {0: 0.2, 2: 5.0}},
            {"sample_weight": np.array([0.2, 1, 5], "float32")[tags]},
        ),
    ],
    ids=["sequences", "labels", "classes"],
)
def test_weights_belong_to_examples_and_classes_to_labels(row, ours, theirs):
    history = fitted(prepared(row, looplab.Trainer), row, **ours).history
    assert_same(history, fitted(prepared(row, compiled), row, **theirs).history)


class Recorder(C.Callback):
    """Records each hook, with its index and logs; stops the training at a batch."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.hooks: list[Any] = []
        self.stop_at = stop_at
        of_batches = [f"{kind}_batch_{when}" for kind in ("train", "test", "predict") for when in ("begin", "end")]
        of_calls = [f"{kind}_{when}" for kind in ("train", "epoch", "test", "predict") for when in ("begin", "end")]
        for name in of_batches + of_calls:
            setattr(self, f"on_{name}", functools.partial(self.record, name))

    def record(self, name, *arguments, logs=None):
        *index, logs = arguments if logs is None and arguments else (*arguments, logs)
        self.hooks.append((name, index, dict(logs or {})))
        if name == "train_batch_end" and index == [self.stop_at]:
            self.model.stop_training = True

    def running(self):
        """The hooks, with the means of the batches so far in place of the values of each batch."""
        seen: list[Any] = []
        for name, index, logs in self.hooks:
            if name.endswith("_begin"):
                seen = seen if "batch" in name else []
            elif name in ("train_batch_end", "test_batch_end"):
                seen.append([*logs.values()])
                sizes = [min(BATCH, (N if "train" in name else 11) - BATCH * batch) for batch in range(len(seen))]
                logs = dict(zip(logs, np.average(seen, 0, sizes), strict=True))
            yield name, index, logs


@pytest.mark.parametrize("stop_at", [None, 1])
def test_callbacks_see_what_keras_shows_them(stop_at):
    row = Row(one, (x, y), MAE, {"validation_data": validation})
    recorders = {}
    for prepare in (compiled, looplab.Trainer):
        trainer, recorder = prepared(row, prepare), Recorder(stop_at)
        recorders[prepare] = recorder
        fitted(trainer, row, callbacks=[recorder])
        assert (recorder.params["epochs"], recorder.params["steps"]) == (2, 3)
        trainer.evaluate(*validation, batch_size=BATCH, callbacks=[recorder], verbose=0)
        trainer.predict(x, batch_size=BATCH, callbacks=[recorder], verbose=0)
    # Keras shows the running means of an epoch after each batch, looplab the values of that batch.
    hooks = zip(recorders[looplab.Trainer].running(), recorders[compiled].hooks, strict=True)
    for (name, index, ours), (their_name, their_index, theirs) in hooks:
        assert (name, index) == (their_name, their_index)
        assert_same(ours, theirs)


def test_hooks_of_batches_may_take_logs_by_name_alone():
    """Keras passes them so."""
    seen = []

    class Named(C.Callback):
        def on_train_batch_begin(self, batch, *, logs):
            seen.append(logs)

        def on_train_batch_end(self, batch, *, logs=None):
            seen.append([*logs])

        on_test_batch_end = on_train_batch_end

    for steps in (1, 2):
        trainer = looplab.Trainer(compiled(one(), loss="mse"), steps_per_execution=steps)
        trainer.fit(x[:8], y[:8], batch_size=4, validation_data=(x[:4], y[:4]), callbacks=[Named()], verbose=0)
        assert seen == [{}, ["loss"], {}, ["loss"], ["loss"]]
        seen.clear()


def test_a_second_fit_continues_with_the_weights_and_the_optimizer():
    row = Row(one, (x, y), adam())
    histories = []
    for prepare in (compiled, looplab.Trainer):
        trainer = prepared(row, prepare)
        fitted(trainer, row)
        histories.append(fitted(trainer, row))
    assert_same(histories[1].history, histories[0].history)
    assert histories[1].epoch == histories[0].epoch
