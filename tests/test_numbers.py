"""Every number is that of NumPy by hand, or of Keras; where the intent is not clear, it is an error."""

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.testing import read_scalars

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(50, 3)).astype("float32")
BITS = (RANDOM.random((50, 1)) < 0.3).astype("float32")
SEQUENCES = RANDOM.normal(size=(10, 5, 3)).astype("float32")


def dense(units=1, activation=None, shape=(3,)):
    return keras.Sequential([keras.Input(shape), layers.Dense(units, activation, name="dense")], name="net")


def predicted(model, x):
    return np.asarray(model(x), "float64")


def binary_crossentropy(y, p):
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


# The value of an epoch is the result of the metric that a step returned, whatever the names.


class Counts(keras.metrics.Metric):
    """Precision and recall, and their counts in a dict of their own."""

    def __init__(self, name="counts"):
        super().__init__(name=name)
        self.both, self.told, self.true = (self.add_variable((), "zeros", name=n) for n in ("both", "told", "true"))

    def update_state(self, y, p, sample_weight=None):
        y, p = tf.cast(y > 0.5, "float32"), tf.cast(p > 0.5, "float32")
        for variable, value in ((self.both, y * p), (self.told, p), (self.true, y)):
            variable.assign_add(tf.reduce_sum(value))

    def result(self):
        counts = {"both": self.both, "true": self.true}
        return {"precision": self.both / self.told, "recall": self.both / self.true, "of": counts}


def by_hand(p):
    y, p = BITS > 0.5, p > 0.5
    counts = {"both": (y & p).sum(), "true": y.sum()}
    return {"precision": (y & p).sum() / p.sum(), "recall": (y & p).sum() / y.sum(), **counts}


class Returning(looplab.Trainer):
    """Returns what `returns` makes of its metrics."""

    def __init__(self, model, returns, **metrics):
        super().__init__(model, optimizer=keras.optimizers.SGD(0.0), loss="binary_crossentropy")
        self.returns, self.named = returns, metrics

    def test_step(self, batch):
        x, y = batch
        p = self(x)
        for metric in self.named.values():
            metric.update_state(y, p)
        return self.returns(self, self.compute_loss(x, y, p))

    def train_step(self, batch):
        return self.test_step(batch)


def auc(p):
    metric = keras.metrics.AUC()
    metric.update_state(BITS, p)
    return float(metric.result())


RETURNED = {
    "a dict as it is": (lambda t, loss: t.named["a"].result(), {"a": Counts}, by_hand),
    "a dict under a key": (lambda t, loss: {"x": {"y": t.named["a"].result()}}, {"a": Counts}, by_hand),
    "an entry under a new key": (
        lambda t, loss: {"r": t.named["a"].result()["recall"]},
        {"a": Counts},
        lambda p: {"r": by_hand(p)["recall"]},
    ),
    "an entry under the name of another metric": (
        lambda t, loss: {"b": t.named["a"].result()["recall"], "c": t.named["b"].result()},
        {"a": Counts, "b": lambda: keras.metrics.AUC(name="b")},
        lambda p: {"b": by_hand(p)["recall"], "c": auc(p)},
    ),
    "two metrics under each other's names": (
        lambda t, loss: {"a": t.named["b"].result(), "b": t.named["a"].result()},
        {"a": lambda: keras.metrics.AUC(name="a"), "b": lambda: keras.metrics.Precision(name="b")},
        lambda p: {"a": by_hand(p)["precision"], "b": auc(p)},
    ),
    "a metric under the key loss": (
        lambda t, loss: {"loss": t.named["a"].result()},
        {"a": lambda: keras.metrics.AUC(name="a")},
        lambda p: {"loss": auc(p)},
    ),
    "a metric that no key names": (
        lambda t, loss: {"loss": loss},
        {"a": lambda: keras.metrics.AUC(name="area")},
        lambda p: {"loss": binary_crossentropy(BITS, p).mean(), "area": auc(p)},
    ),
    "what is computed from a result is a mean of batches": (
        lambda t, loss: {"twice": 2 * t.named["a"].result()},
        {"a": lambda: keras.metrics.MeanSquaredError(name="a")},
        lambda p: {"twice": 2 * ((BITS - p) ** 2).mean()},
    ),
}


@pytest.mark.parametrize(("returns", "metrics", "expected"), RETURNED.values(), ids=RETURNED)
def test_an_epoch_has_the_result_of_the_metric_that_was_returned(returns, metrics, expected):
    trainer = Returning(dense(1, "sigmoid"), returns, **{name: make() for name, make in metrics.items()})
    values = expected(predicted(trainer.model, X))
    assert trainer.evaluate(X, BITS, batch_size=8, verbose=0) == pytest.approx(values, rel=1e-5)
    history = trainer.fit(X, BITS, batch_size=8, epochs=2, validation_data=(X, BITS), verbose=0).history
    for name, value in values.items():
        expected = pytest.approx([value] * 2, rel=1e-5)
        assert (history[name], history[f"val_{name}"]) == (expected, expected), name


def of_batches(p):
    """The mean over batches of 8 of their area under the curve, weighted by their size."""
    parts = [(BITS[i : i + 8], p[i : i + 8]) for i in range(0, 50, 8)]
    return sum(area(*part) * len(part[0]) for part in parts) / 50


def area(y, p):
    metric = keras.metrics.AUC()
    metric.update_state(y, p)
    return float(metric.result())


RESETS = {  # what a step does with one metric, and the results that it returns
    "before": ("reset update a", {"a": lambda p: area(BITS[48:], p[48:])}),  # as in Keras, what the last batch left
    "after": ("update a reset", {"a": of_batches}),
    "between": ("reset update a reset invert b", {"a": of_batches, "b": lambda p: area(BITS[48:], 1 - p[48:])}),
    "never": ("update a invert b", {"b": lambda p: area(np.r_[BITS, BITS], np.r_[p, 1 - p])}),
}


@pytest.mark.parametrize(
    ("order", "expected", "eager"), [*((*values, False) for values in RESETS.values()), (*RESETS["between"], True)]
)
def test_a_step_may_reset_a_metric(order, expected, eager):
    class Resets(looplab.Trainer):
        def test_step(self, batch):
            x, y = batch
            p, results = self(x), {}
            for action in order.split():
                if action == "reset":
                    self.area.reset_state()
                elif action in ("update", "invert"):
                    self.area.update_state(y, p if action == "update" else 1 - p)
                else:
                    results[action] = self.area.result()
            return results

    trainer = Resets(dense(1, "sigmoid"), run_eagerly=eager)
    trainer.area = keras.metrics.AUC()
    p = predicted(trainer.model, X)
    for _ in range(2):
        results = trainer.evaluate(X, BITS, batch_size=8, verbose=0)
        assert {name: results[name] for name in expected} == pytest.approx(
            {name: value(p) for name, value in expected.items()}, rel=1e-5
        )


def test_the_losses_of_outputs_without_names_are_all_there(tmp_path):
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x), 2 * self.dense(x)

    model = Two()
    options = {"loss": ["mse", "mse"], "loss_weights": [1.0, 3.0], "metrics": ["mae", "mae"]}
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), log_dir=tmp_path, **options)
    history = trainer.fit(X, (BITS, BITS), batch_size=8, verbose=0).history
    errors = [np.asarray(output) - BITS for output in model(X)]
    one, other = ((error**2).mean() for error in errors)
    expected = {"loss": one + 3 * other, "mse_loss": one, "mse_loss_1": other}
    expected |= {"mae": abs(errors[0]).mean(), "mae_1": abs(errors[1]).mean()}
    assert history == {name: pytest.approx([value], rel=1e-5) for name, value in expected.items()}
    points = read_scalars(tmp_path / "train")
    parts = [np.average(points[f"batch_loss/{n}"][1], weights=[8] * 6 + [2]) for n in ("mse_loss", "mse_loss_1")]
    assert parts == pytest.approx([one, 3 * other], rel=1e-5)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_models_own_metrics_leave_the_losses(outputs, own_loss):
    """`super().compute_metrics` of Keras also returns its means of losses."""

    class Own(keras.Model):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            results = super().compute_metrics(x, y, y_pred, sample_weight)
            return {**results, "largest": tf.reduce_max(y_pred if outputs == 1 else y_pred[0])}

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (2 if own_loss else 1)

    inputs = keras.Input((3,))
    named = [layers.Dense(1, name=name)(inputs) for name in "ab"[:outputs]]
    model = Own(inputs, named if outputs == 2 else named[0])
    options = {"loss": "mse", "metrics": [["mae"]] * 2 if outputs == 2 else ["mae"]}
    y = [BITS] * 2 if outputs == 2 else BITS
    model.compile(**options)
    expected = model.evaluate(X, y, batch_size=50, verbose=0, return_dict=True)
    results = looplab.Trainer(model, **options).evaluate(X, y, batch_size=50, verbose=0)
    assert results == pytest.approx(expected, rel=1e-5)


def test_dict_results_of_compiled_metrics_equal_those_of_keras():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [layers.Dense(1, "sigmoid", name=name)(inputs) for name in "ab"])
    arguments = {"loss": "binary_crossentropy", "metrics": [[Counts()], ["accuracy"]]}
    model.compile(**arguments)
    expected = model.evaluate(X, [BITS, BITS], verbose=0, return_dict=True)
    trainer = looplab.Trainer(model, **arguments | {"metrics": [[Counts()], ["accuracy"]]})
    results = trainer.evaluate(X, [BITS, BITS], verbose=0)
    for name, p in zip("ab", model(X), strict=True):  # Keras takes the mean over batches, whatever their size
        expected[f"{name}_loss"] = binary_crossentropy(BITS, np.asarray(p)).mean()
    assert results == pytest.approx(expected, rel=1e-5)


CLASHES = {
    "two dicts": (
        lambda t, loss: {"a": t.named["a"].result(), "b": t.named["b"].result()},
        {"a": lambda: Counts("a"), "b": lambda: Counts("b")},
        ["'precision'", "metric 'a'", "metric 'b'"],
    ),
    "an entry and a value": (
        lambda t, loss: {"recall": loss, "a": t.named["a"].result()},
        {"a": lambda: Counts("a")},
        ["'recall'", "returned by `test_step`", "metric 'a'"],
    ),
    "a logged value": (
        lambda t, loss: t.log("loss", 1.0) or {"loss": loss},
        {},
        ["'loss'", "returned by `test_step`", "`self.log`"],
    ),
    "a metric that was not returned": (
        lambda t, loss: {"a": loss},
        {"a": lambda: keras.metrics.AUC(name="a")},
        ["'a'", "returned by `test_step`", "metric 'a'"],
    ),
}


@pytest.mark.parametrize(("returns", "metrics", "needles"), CLASHES.values(), ids=CLASHES)
def test_two_values_of_one_name_are_an_error_that_names_both(returns, metrics, needles):
    trainer = Returning(dense(1, "sigmoid"), returns, **{name: make() for name, make in metrics.items()})
    with pytest.raises(ValueError, match="has two values named") as error:
        trainer.evaluate(X, BITS, verbose=0)
    assert [needle for needle in needles if needle not in str(error.value)] == []


def test_compiled_metrics_with_one_name_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"two values named .loss.: the loss, and .loss. of `metrics`"):
        looplab.Trainer(dense(), loss="mse", metrics=[keras.metrics.AUC(name="loss")]).evaluate(X, BITS, verbose=0)


@pytest.mark.parametrize("eager", [False, True])
def test_a_metric_that_no_attribute_leads_to_is_reset_and_kept_apart(eager):
    metrics = {}  # hidden from any search

    class Hidden(looplab.Trainer):
        def train_step(self, batch):
            metric = metrics.setdefault("sum", keras.metrics.Sum(name="sum")) if not metrics else metrics["sum"]
            metric.update_state(batch)
            return {"sum": metric.result(), "running": self.running_result(metric)}

    hidden = Hidden(run_eagerly=eager)
    history = hidden.fit(X, batch_size=10, epochs=3, shuffle=False, verbose=0).history
    assert history["sum"] == history["running"] == pytest.approx([X.sum()] * 3, rel=1e-4)


def test_the_running_value_is_that_of_the_epoch_so_far(tmp_path):
    class Running(looplab.Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.mean = keras.metrics.Mean(name="mean")

        def train_step(self, batch):
            self.mean.update_state(batch)
            return {"batch": self.mean.result(), "so_far": self.running_result(self.mean)}

    Running(log_dir=tmp_path).fit(X, batch_size=10, epochs=2, shuffle=False, verbose=0)
    points = read_scalars(tmp_path / "train")
    starts = range(0, 50, 10)
    assert points["batch_batch"][1] == pytest.approx([X[i : i + 10].mean() for i in starts] * 2, rel=1e-4)
    assert points["batch_so_far"][1] == pytest.approx([X[: i + 10].mean() for i in starts] * 2, rel=1e-4)


class InPython(keras.metrics.Metric):
    """Counts rows in an attribute of Python's."""

    def __init__(self, state, change, name="rows"):
        super().__init__(name=name)
        self.state, self.change = state, change

    def update_state(self, y, p, sample_weight=None):
        self.change(self)

    def result(self):
        return 1.0


@pytest.mark.parametrize("eager", [False, True])
def test_a_metric_that_keeps_its_state_in_python_is_refused(eager):
    metric = InPython({"a": []}, lambda m: m.state["a"].append(0))
    trainer = looplab.Trainer(dense(), optimizer="sgd", loss="mse", metrics=[metric], run_eagerly=eager)
    before = trainer.get_weights()
    with pytest.raises(ValueError, match="Metric 'rows' keeps state in the Python attribute `state`"):
        trainer.fit(X, BITS, verbose=0)
    for one, other in zip(before, trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


ARGUMENTS = {  # of the first metric whose name has this part
    **{"BinaryIoU": [[0, 1]], "MeanIoU": [2], "IoU": [2, [0]], "MetricWrapper": [keras.losses.mean_squared_error]},
    **{"AtSensitivity": [0.5], "AtSpecificity": [0.5], "AtRecall": [0.5], "AtPrecision": [0.5]},
}


def built_in_metrics():
    for name, kind in vars(keras.metrics).items():
        if isinstance(kind, type) and issubclass(kind, keras.metrics.Metric) and kind is not keras.metrics.Metric:
            arguments = next((values for part, values in ARGUMENTS.items() if part in name), [])
            yield name, functools.partial(kind, *arguments)


def test_each_metric_of_keras_has_its_own_result_over_all_data():
    y, p = np.tile(BITS, 2), np.tile(predicted(dense(1, "sigmoid"), X), 2).astype("float32")

    def update(name, metric, y, p):
        metric.update_state(*([p] if name in ("Mean", "Sum") else [y[:, 0] if "Sparse" in name else y, p]))

    class All(looplab.Trainer):
        def __init__(self):
            super().__init__()
            self.named = {name: make(name=name) for name, make in built_in_metrics()}

        def test_step(self, batch):
            for name, metric in self.named.items():
                update(name, metric, *batch)
            results = {name: metric.result() for name, metric in self.named.items()}
            return {name: value for name, value in results.items() if value.shape == ()}

    expected = {}
    for name, make in built_in_metrics():
        metric = make()
        update(name, metric, y, p)
        expected[name] = np.asarray(metric.result())
    results = All().evaluate(y, p, batch_size=16, verbose=0)
    assert len(results) > 40
    assert {*expected} - {*results} == {"F1Score", "FBetaScore"}  # which are vectors
    for name, value in results.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("owner", ["trainer", "layer"])
def test_a_metric_that_is_not_returned_may_have_any_shape(owner, tmp_path):
    class Measuring(layers.Layer):
        def __init__(self):
            super().__init__()
            self.vector = keras.metrics.F1Score(name="vector")

        def call(self, p):
            self.vector.update_state(tf.one_hot([0, 1], 3), tf.one_hot([0, 2], 3))
            return p

    class Own(looplab.Trainer):
        def train_step(self, batch):
            if owner == "trainer":
                self.vector.update_state(tf.one_hot([0, 1], 3), tf.one_hot([0, 2], 3))
            return super().train_step(batch)

    measuring = Measuring() if owner == "layer" else layers.Identity()
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1), measuring])
    trainer = Own(model, optimizer="sgd", loss="mse", log_dir=tmp_path)
    metric = trainer.vector = keras.metrics.F1Score(name="vector") if owner == "trainer" else measuring.vector
    history = trainer.fit(X, BITS, batch_size=10, verbose=0).history
    assert set(history) == {"loss", "vector"}
    points = read_scalars(tmp_path / "train")
    for index, value in enumerate([1.0, 0.0, 0.0]):
        shown = [metric.result()[index], history["vector"][0][index]]
        shown += [*points[f"batch_vector/{index}"][1], *points[f"epoch_vector/{index}"][1]]
        np.testing.assert_allclose(shown, value, atol=1e-6)


class Nested(keras.callbacks.Callback):
    """Evaluates other data in the midst of an evaluation or a training."""

    def __init__(self, hook):
        super().__init__()
        self.is_within = False
        setattr(self, hook, self.evaluate)

    def evaluate(self, *_, **logs):
        if not self.is_within:
            self.is_within = True
            self.model.evaluate(X[:5] * 9, BITS[:5], verbose=0)
            self.is_within = False


@pytest.mark.parametrize("eager", [False, True])
def test_an_evaluation_within_another_pass_changes_no_value(eager):
    def run(*callbacks):
        keras.utils.set_random_seed(0)
        trainer = looplab.Trainer(dense(), optimizer="sgd", loss="mse", metrics=["mae"], seed=0, run_eagerly=eager)
        options = {"batch_size": 8, "verbose": 0, "callbacks": list(callbacks)}
        history = trainer.fit(X, BITS, epochs=2, validation_data=(X, BITS), **options).history
        return history, trainer.evaluate(X, BITS, **options)

    expected = run()
    for hook in ["on_test_batch_end"] if eager else ["on_test_batch_end", "on_train_batch_begin", "on_epoch_begin"]:
        assert run(Nested(hook)) == expected, hook


@pytest.mark.parametrize("eager", [False, True])
def test_callbacks_see_the_metrics_of_an_evaluation_when_it_ends(eager):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            metrics = {metric.name: metric.result() for metric in self.model.metrics}
            seen.append((float(metrics["loss"]), float(metrics["compile_metrics"]["mae"]), logs["loss"], logs["mae"]))

    trainer = looplab.Trainer(dense(), optimizer="sgd", loss="mse", metrics=["mae"], run_eagerly=eager)
    trainer.fit(X, BITS, validation_data=(X * 3, BITS), callbacks=[Look()], verbose=0)
    trainer.evaluate(X * 2, BITS, callbacks=[Look()], verbose=0)
    for loss, mae, logged_loss, logged_mae in seen:
        assert (loss, mae) == pytest.approx((logged_loss, logged_mae), rel=1e-5)
    assert len(seen) == 2


def test_a_logged_result_is_the_metrics_own():
    class Logs(looplab.Trainer):
        def test_step(self, batch):
            self.rmse.update_state(batch[1], self(batch[0]))
            self.log("rmse", self.rmse.result())
            return {"zero": 0.0}

    trainer = Logs(dense())
    trainer.rmse = keras.metrics.RootMeanSquaredError()
    value = np.sqrt(((predicted(trainer.model, X) - BITS) ** 2).mean())
    assert trainer.evaluate(X, BITS, batch_size=8, verbose=0) == {"zero": 0, "rmse": pytest.approx(value, rel=1e-5)}


@pytest.mark.parametrize("eager", [False, True])
def test_a_result_in_an_inner_tf_function_is_an_error(eager):
    class Inner(looplab.Trainer):
        @tf.function
        def measure(self, y, p):
            self.rmse.update_state(y, p)
            return self.rmse.result()

        def test_step(self, batch):
            return {"rmse": self.measure(batch[1], self(batch[0]))}

    trainer = Inner(dense(), run_eagerly=eager)
    trainer.rmse = keras.metrics.RootMeanSquaredError(name="rmse")
    with pytest.raises(ValueError, match=r"`result` of metric 'rmse' is called in an inner `tf\.function`"):
        trainer.evaluate(X, BITS, verbose=0)


# Weights belong to the leading dimensions of what they weigh.


W = np.arange(10, dtype="float32")
IMAGES = RANDOM.normal(size=(10, 4, 4, 3)).astype("float32")


def squared_errors(model, x, y):
    return ((predicted(model, x) - y) ** 2).mean(-1)


SAMPLE_WEIGHTS = {
    "(n,) for losses (n, T)": (SEQUENCES, (10, 5, 1), W, lambda e: e * W[:, None]),
    "(n, 1) for losses (n, T)": (SEQUENCES, (10, 5, 1), W[:, None], lambda e: e * W[:, None]),
    "(n, T)": (SEQUENCES, (10, 5, 1), np.arange(50.0).reshape(10, 5), lambda e: e * np.arange(50).reshape(10, 5)),
    "(n, T, 1)": (SEQUENCES, (10, 5, 1), np.ones((10, 5, 1)) * 3, lambda e: e * 3),
    "(n,) for losses (n, H, W)": (IMAGES, (10, 4, 4, 1), W, lambda e: e * W[:, None, None]),
    "(n, H) for losses (n, H, W)": (IMAGES, (10, 4, 4, 1), W[:, None] * np.ones(4), lambda e: e * W[:, None, None]),
    "(n, 1) for losses (n,)": (X[:10], (10, 1), W[:, None], lambda e: e * W),
    "(n,) for losses (n,)": (X[:10], (10, 1), W, lambda e: e * W),
}


@pytest.mark.parametrize(("x", "shape", "weights", "expected"), SAMPLE_WEIGHTS.values(), ids=SAMPLE_WEIGHTS)
def test_sample_weights_weigh_the_leading_dimensions(x, shape, weights, expected):
    y = RANDOM.normal(size=shape)
    model = dense(shape=x.shape[1:])
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss="mse")
    value = pytest.approx(expected(squared_errors(model, x, y)).mean(), rel=1e-5)
    for size in (4, 5, 10):  # 5 is also the length of the sequences
        assert trainer.evaluate(x, y, sample_weight=weights, batch_size=size, verbose=0)["loss"] == value
        assert trainer.fit(x, y, sample_weight=weights, batch_size=size, verbose=0).history["loss"] == [value]


def one_number(y, p):
    return tf.reduce_mean((y - p) ** 2)


MISFITS = {
    "one for each label": ("binary_crossentropy", X[:10], (10, 3), np.ones((10, 3)), "(None, 3)", "(None,)"),
    "of another length": ("mse", SEQUENCES, (10, 5, 1), np.ones((10, 3)), "(None, 3)", "(None, 5)"),
    "of too high a rank": ("mse", SEQUENCES, (10, 5, 1), np.ones((10, 5, 2)), "(None, 5, 2)", "(None, 5)"),
    "for a loss of one number": (one_number, X[:10], (10, 1), W, "(None,)", "()"),
}


@pytest.mark.parametrize(("loss", "x", "shape", "weights", "one", "other"), MISFITS.values(), ids=MISFITS)
def test_sample_weights_that_fit_nothing_are_an_error_with_both_shapes(loss, x, shape, weights, one, other):
    model = dense(shape[-1], "sigmoid", x.shape[1:])
    trainer = looplab.Trainer(model, optimizer="sgd", loss=loss)
    with pytest.raises(ValueError, match="`sample_weight` of shape") as error:
        trainer.fit(x, np.ones(shape), sample_weight=weights, verbose=0)
    assert one in str(error.value)
    assert f"of shape {other}" in str(error.value)


LABELS = RANDOM.integers(0, 3, (10, 4, 4))
OF_CLASS = np.array([1.0, 10.0, 100.0])
GIVEN = {0: 1.0, 1: 10.0, 2: 100.0}


def crossentropies(model, x, labels):
    return -np.log(np.take_along_axis(predicted(model, x), labels[..., None], -1)[..., 0])


CLASS_WEIGHTS = {
    "labels (n,)": (X[:10], LABELS[:, 0, 0], LABELS[:, 0, 0], GIVEN),
    "labels (n, 1)": (X[:10], LABELS[:, 0, :1], LABELS[:, 0, 0], GIVEN),
    "floating labels": (X[:10], LABELS[:, 0, 0].astype("float32"), LABELS[:, 0, 0], GIVEN),
    "labels (n, T)": (IMAGES[:, 0], LABELS[:, 0], LABELS[:, 0], GIVEN),
    "labels (n, T, 1)": (IMAGES[:, 0], LABELS[:, 0, :, None], LABELS[:, 0], GIVEN),
    "labels (n, H, W)": (IMAGES, LABELS, LABELS, GIVEN),
    "one-hot (n, C)": (X[:10], np.eye(3)[LABELS[:, 0, 0]], LABELS[:, 0, 0], GIVEN),
    "one-hot (n, T, C)": (IMAGES[:, 0], np.eye(3)[LABELS[:, 0]], LABELS[:, 0], GIVEN),
    "a list": (X[:10], LABELS[:, 0, 0], LABELS[:, 0, 0], [1.0, 10.0, 100.0]),
    "an array": (IMAGES, LABELS, LABELS, OF_CLASS),
    "classes without a weight": (X[:10], LABELS[:, 0, 0], LABELS[:, 0, 0], {1: 10.0, 2: 100.0}),
    "keys of NumPy's": (X[:10], LABELS[:, 0, 0], LABELS[:, 0, 0], {np.int64(1): 10, np.int64(2): np.float32(100)}),
}


@pytest.mark.parametrize(("x", "y", "labels", "given"), CLASS_WEIGHTS.values(), ids=CLASS_WEIGHTS)
def test_class_weights_weigh_each_class(x, y, labels, given):
    model = dense(3, "softmax", x.shape[1:])
    loss = (
        "categorical_crossentropy" if y.shape[-1] == 3 and y.dtype == np.float64 else "sparse_categorical_crossentropy"
    )
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss=loss)
    value = (crossentropies(model, x, labels) * OF_CLASS[labels]).mean()
    history = trainer.fit(x, y, 4, class_weight=given, verbose=0).history
    assert history["loss"] == [pytest.approx(value, rel=1e-5)]


def test_class_weights_of_a_dataset_are_for_training_alone():
    x, y, labels, given = CLASS_WEIGHTS["one-hot (n, T, C)"]
    model = dense(3, "softmax", x.shape[1:])
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss="categorical_crossentropy")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    history = trainer.fit(data, class_weight=given, validation_data=data, verbose=0).history
    losses = crossentropies(model, x, labels)
    assert history["loss"] == [pytest.approx((losses * OF_CLASS[labels]).mean(), rel=1e-5)]
    assert history["val_loss"] == [pytest.approx(losses.mean(), rel=1e-5)]


def test_class_weights_multiply_sample_weights_and_round_and_ignore_as_keras_does():
    model = dense(3, "softmax")
    ignoring = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss=ignoring)
    labels = LABELS[:, 0, 0]
    values = crossentropies(model, X[:10], labels) * OF_CLASS[labels]
    fit = functools.partial(trainer.fit, X[:10], class_weight=GIVEN, verbose=0)
    assert fit(labels, sample_weight=W).history["loss"] == [pytest.approx((values * W).mean(), rel=1e-5)]
    fewer = np.where(labels == 1, -1, labels)
    model.compile(keras.optimizers.SGD(0.0), ignoring)
    expected = (values * (labels != 1)).sum() / (labels != 1).sum()  # Keras: the mean of what is not ignored
    assert fit(fewer).history["loss"][0] == pytest.approx(expected, rel=1e-5)

    model = dense(1, "sigmoid")
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss="binary_crossentropy")
    y, weights = np.where(BITS > 0, 0.9, 0.1), {0: 1.0, 1: 7.0}
    value = (binary_crossentropy(y, predicted(model, X)) * np.where(BITS > 0, 7, 1)).mean()
    assert trainer.fit(X, y, class_weight=weights, verbose=0).history["loss"] == [pytest.approx(value, rel=1e-5)]


NOT_ONE_CLASS = {
    "several labels": ("binary_crossentropy", (RANDOM.random((50, 3)) < BITS).astype("float32")),
    "several numbers": ("mse", X),
    "a row that is no distribution": ("categorical_crossentropy", np.ones((50, 3), "float32")),
    "several labels for a loss of one's own": (lambda y, p: tf.reduce_mean((y - p) ** 2, -1), np.ones((50, 3), int)),
    "several outputs": ("mse", {"a": X, "b": X}),
}


@pytest.mark.parametrize(("loss", "y"), NOT_ONE_CLASS.values(), ids=NOT_ONE_CLASS)
def test_class_weights_of_what_is_not_one_class_are_an_error(loss, y):
    trainer = looplab.Trainer(dense(3, "sigmoid"), optimizer="sgd", loss=loss)
    before = trainer.get_weights()
    with pytest.raises(ValueError, match="`class_weight` needs"):
        trainer.fit(X, y, class_weight=GIVEN, verbose=0)
    for one, other in zip(before, trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# A batch weighs as much as it has examples.


def of_rows(x):
    """The first thing in a structure that has a row for each example, by name."""
    return x["x"] if isinstance(x, dict) else x[1]


class Mean(looplab.Trainer):
    """Tells the mean of the rows."""

    def test_step(self, batch):
        x = batch[0] if isinstance(batch, tuple) and len(batch) == 2 else batch
        return {"mean": tf.reduce_mean(of_rows(x))}


TABLE = np.ones((7, 4), "float32")
BATCHES = {
    "a scalar first": lambda x: {"beta": tf.constant(1.0), "x": x},
    "a table first": lambda x: {"table": tf.constant(TABLE), "x": x},
    "an adjacency matrix first": lambda x: {"a": tf.zeros((8, 8)), "x": x},
    "a table, and y": lambda x: ({"table": tf.constant(TABLE), "x": x}, x[:, 0]),
    "tables of one size first": lambda x: {"a": tf.eye(5), "b": tf.ones(5), "x": x},
    "a table of one row, and a dict y": lambda x: ({"table": tf.ones((1, 2)), "x": x}, {"s": 1.0, "y": x[:, 0]}),
    "four parts": lambda x: (tf.constant(3), x, x[:, 0], tf.ones((2, 2))),
    "a ragged part first": lambda x: (tf.constant(3), x, tf.RaggedTensor.from_tensor(x), x),
}


@pytest.mark.parametrize(
    ("make", "eager"), [*((make, False) for make in BATCHES.values()), (BATCHES["a table, and y"], True)]
)
def test_a_batch_weighs_as_much_as_it_has_examples(make, eager):
    data = tf.data.Dataset.from_tensor_slices(X).batch(8).map(make)
    assert Mean(run_eagerly=eager).evaluate(data, verbose=0)["mean"] == pytest.approx(X.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("make", "eager"), [*((make, False) for make in [*BATCHES.values()][:6]), (BATCHES["a table, and y"], True)]
)
def test_predictions_have_a_row_for_each_example(make, eager):
    """Beside a scalar, a table or a matrix, also where y is a part of the data."""

    class Rows(keras.Model):
        def call(self, x):
            return 2 * x["x"]

    data = tf.data.Dataset.from_tensor_slices(X).batch(8).map(make)
    predictions = looplab.Trainer(Rows(), run_eagerly=eager).predict(data, verbose=0)
    np.testing.assert_array_equal(predictions, 2 * X)


def test_a_tuple_x_may_have_a_matrix():
    class First(keras.Model):
        def call(self, x):
            return 2 * x[0]

    data = tf.data.Dataset.from_tensor_slices(X).batch(8).map(lambda x: ((x, tf.eye(7)), x))
    np.testing.assert_array_equal(looplab.Trainer(First()).predict(data, verbose=0), 2 * X)


@pytest.mark.parametrize("eager", [False, True])
def test_batches_of_one_size_weigh_the_same(eager):
    """Which dimension counts the examples is not known here, and makes no difference."""
    data = tf.data.Dataset.from_tensor_slices(X).batch(8, drop_remainder=True).map(lambda x: {"a": tf.eye(4), "x": x})
    assert Mean(run_eagerly=eager).evaluate(data, verbose=0)["mean"] == pytest.approx(X[:48].mean(), abs=1e-6)


def test_parts_of_a_batch_that_differ_in_length_are_an_error():
    def make():
        yield np.ones(3), np.ones(3)
        yield np.ones(3), np.ones(4)

    spec = tf.TensorSpec((None,))
    lengths = tf.data.Dataset.from_generator(
        lambda: ({"a": a, "x": x} for a, x in make()), output_signature={"a": spec, "x": spec}
    )
    with pytest.raises(ValueError, match="parts of the batch differ in their number of examples"):
        Mean().evaluate(lengths, verbose=0)


# Gradients are the user's.


class Gradients(looplab.Trainer):
    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(self(x, training=True), "float32") - y) ** 2)
        found = self.minimize(tape, loss)
        return {"loss": loss, "norm": tf.linalg.global_norm(found)}


def gradient_norm(model, x, y):
    kernel, bias = (np.asarray(v, "float64") for v in model.trainable_variables)
    error = x @ kernel + bias - y
    return np.sqrt(((2 * x.T @ error / len(x)) ** 2).sum() + (2 * error.mean()) ** 2)


@pytest.mark.parametrize("kind", ["plain", "scaled", "dynamic", "clipped", "replicas"])
def test_minimize_returns_the_gradients_of_the_loss(kind, two_devices):
    sgd = {
        "plain": lambda: keras.optimizers.SGD(0.1),
        "scaled": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=1024.0),
        "dynamic": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
        "clipped": lambda: keras.optimizers.SGD(0.1, clipnorm=1e-3),
        "replicas": lambda: keras.optimizers.SGD(0.1),
    }[kind]
    strategy = two_devices if kind == "replicas" else tf.distribute.get_strategy()
    x, y = (X, BITS) if kind != "replicas" else (np.concatenate([X, X]), np.concatenate([BITS, BITS]))
    with strategy.scope():
        trainer = Gradients(dense(), optimizer=sgd())
    norm = gradient_norm(trainer.model, X, BITS)
    history = trainer.fit(x, y, batch_size=len(x), shuffle=False, verbose=0).history
    assert history["norm"] == [pytest.approx(norm, rel=1e-4)]


def test_sparse_gradients_are_unscaled_too():
    embedding = layers.Embedding(5, 2)

    class Sparse(looplab.Trainer):
        def train_step(self, batch):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(embedding(batch))
            (found,) = self.minimize(tape, loss, embedding.trainable_variables, self.optimizer)
            return {"sum": tf.reduce_sum(tf.convert_to_tensor(found))}

    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    assert Sparse(optimizer=optimizer).fit(np.array([1, 1, 2]), verbose=0).history["sum"] == [6.0]


@pytest.mark.parametrize("eager", [False, True])
def test_replicas_train_as_one_device_does(eager, two_devices):
    def run(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            trainer = looplab.Trainer(dense(), optimizer="sgd", loss="mse", metrics=["mae"], seed=0, run_eagerly=eager)
        history = trainer.fit(X, BITS, batch_size=10, validation_data=(X, BITS), verbose=0).history
        return [value for values in history.values() for value in values]

    assert run(two_devices) == pytest.approx(run(tf.distribute.get_strategy()), rel=1e-5)


# A trace follows what it depends on.


def means_move(trainer, norm, **options):
    before = norm.moving_mean.numpy()
    trainer.fit(X, BITS, batch_size=10, verbose=0, **options)
    return bool(np.abs(norm.moving_mean.numpy() - before).max() > 0)


@pytest.mark.parametrize(
    ("where", "affine"),
    [("between", False), ("epoch", True), ("batch", True), ("begin", False), ("nested", True)],
)
def test_a_layer_is_frozen_from_then_on(where, affine):
    norm = layers.BatchNormalization(center=affine, scale=affine)
    block = keras.Sequential([layers.Dense(4), norm])
    trainer = looplab.Trainer(
        keras.Sequential([keras.Input((3,)), block, layers.Dense(1)]), optimizer="sgd", loss="mse"
    )
    assert means_move(trainer, norm)
    frozen = block if where == "nested" else norm
    seen = []

    def freeze(*_, **logs):
        frozen.trainable = False
        seen.append(norm.moving_mean.numpy())

    if where in ("between", "nested"):
        freeze()
        assert not means_move(trainer, norm)
    else:
        hook = {"epoch": "on_epoch_end", "batch": "on_train_batch_end", "begin": "on_train_batch_begin"}[where]
        callback = keras.callbacks.LambdaCallback(**{hook: freeze})
        trainer.fit(X, BITS, batch_size=10, epochs=2, verbose=0, callbacks=[callback])
        np.testing.assert_array_equal(norm.moving_mean.numpy(), seen[0])
    frozen.trainable = True
    trainer.optimizer = keras.optimizers.SGD(0.01)
    assert means_move(trainer, norm)


def test_a_new_loss_or_metric_of_a_step_is_the_one_that_counts():
    class Own(looplab.Trainer):
        def test_step(self, batch):
            x, y = batch
            p = self(x)
            self.metric.update_state(y, p)
            return {"loss": self.distance(y, p), "metric": self.metric.result()}

    trainer = Own(dense())
    error = predicted(trainer.model, X) - BITS
    for distance, value in (
        (keras.losses.MeanSquaredError(), error**2),
        (keras.losses.MeanAbsoluteError(), abs(error)),
    ):
        trainer.distance = distance
        trainer.metric = keras.metrics.MeanMetricWrapper(distance.fn, name="one")
        expected = pytest.approx(value.mean(), rel=1e-5)
        assert trainer.evaluate(X, BITS, verbose=0) == {"loss": expected, "metric": expected}
    trainer.distance = lambda y, p: tf.constant(3.0)
    assert trainer.evaluate(X, BITS, verbose=0)["loss"] == 3


def test_a_new_schedule_counts_at_once():
    trainer = looplab.Trainer(dense(), optimizer=keras.optimizers.SGD(0.1), loss="mse")
    trainer.fit(X, BITS, verbose=0)
    weights = []

    def stand_still(*_):
        weights.append(trainer.get_weights())
        trainer.optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(0.0, 5, 0.0)

    callback = keras.callbacks.LambdaCallback(on_epoch_end=stand_still)
    trainer.fit(X, BITS, epochs=2, verbose=0, callbacks=[callback])
    trainer.fit(X, BITS, verbose=0)
    for one, other in zip(weights[0], trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unfreezing_says_what_to_do_and_does_it_with_a_new_optimizer():
    base, head = layers.Dense(4, name="base"), layers.Dense(1, name="head")
    trainer = looplab.Trainer(keras.Sequential([keras.Input((3,)), base, head]), optimizer="adam", loss="mse")
    base.trainable = False
    trainer.fit(X, BITS, verbose=0)
    base.trainable = True
    before = trainer.get_weights()
    with pytest.raises(
        ValueError, match=r"built without .*base/kernel.*`trainer.optimizer = keras.optimizers.Adam"
    ) as e:
        trainer.fit(X, BITS, verbose=0)
    assert "in user code" not in str(e.value)
    assert len(e.traceback) < 12
    for one, other in zip(before, trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    trainer.optimizer = keras.optimizers.Adam()
    trainer.fit(X, BITS, verbose=0)
    assert not np.array_equal(before[0], trainer.get_weights()[0])


class Fails(looplab.Trainer):
    """Fails in one of its steps, in the way that is asked for."""

    fails = ""

    def train_step(self, batch):
        logs = super().train_step(batch)
        if self.fails == "train":
            raise NameError("typo")
        return logs if self.fails != "name" else {**logs, 3: logs["loss"]}

    def test_step(self, batch):
        if self.fails == "test":
            raise NameError("typo")
        return super().test_step(batch)


class Lazy(keras.Model):
    def __init__(self, fails=False):
        super().__init__()
        self.first, self.second, self.fails = layers.Dense(4), layers.Dense(3, "softmax"), fails

    def call(self, x):
        hidden = self.first(x)
        if self.fails:
            raise KeyError("no such option")
        return self.second(hidden)


@pytest.mark.parametrize("fails", ["train", "test", "name", "model", "y"])
def test_the_right_call_works_after_a_call_that_failed(fails):
    """With a model and metrics that are built by the first trace."""
    labels = RANDOM.integers(0, 3, 50)

    def train(fails):
        keras.utils.set_random_seed(0)
        trainer = Fails(
            Lazy(fails == "model"), optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["acc"]
        )
        trainer.fails = fails
        fit = functools.partial(trainer.fit, X, validation_data=(X, labels), shuffle=False, epochs=2, verbose=0)
        if fails:
            with pytest.raises(Exception):  # noqa: B017, PT011
                fit(np.eye(3)[labels] if fails == "y" else labels)
        trainer.fails = trainer.model.fails = ""
        return fit(labels).history, trainer.get_weights()

    expected, weights = train("")
    history, others = train(fails)
    assert history.keys() == expected.keys()
    for name, values in history.items():
        assert values == pytest.approx(expected[name], rel=1e-5), name
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# Logits and probabilities.


@pytest.mark.parametrize(
    ("metric", "warns"),
    [
        (lambda: "accuracy", True),
        (lambda: keras.metrics.Precision(), True),
        (lambda: keras.metrics.TruePositives(), True),
        (lambda: keras.metrics.AUC(), True),
        (lambda: keras.metrics.BinaryCrossentropy(), True),
        (lambda: keras.metrics.BinaryIoU([0, 1]), True),
        (lambda: keras.metrics.BinaryAccuracy(threshold=0.0), False),
        (lambda: keras.metrics.Recall(thresholds=0.0), False),
        (lambda: keras.metrics.AUC(from_logits=True), False),
        (lambda: keras.metrics.BinaryCrossentropy(from_logits=True), False),
        (lambda: "mse", False),
    ],
)
def test_metrics_of_probabilities_on_logits_are_a_warning(metric, warns, recwarn):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    looplab.Trainer(dense(), optimizer="sgd", loss=loss, metrics=[metric()]).evaluate(X, BITS, verbose=0)
    assert bool([w for w in recwarn if "expects probabilities" in str(w.message)]) == warns


def test_one_mistake_about_logits_is_one_warning(recwarn):
    model = keras.Sequential([keras.Input(X.shape[1:]), keras.layers.Dense(BITS.shape[-1], "sigmoid")])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    metrics = ["accuracy", keras.metrics.AUC()]
    looplab.Trainer(model, optimizer="sgd", loss=loss, metrics=metrics).fit(X, BITS, validation_split=0.5, verbose=0)
    (text,) = [str(warning.message) for warning in recwarn if "logits" in str(warning.message)]
    assert "the model outputs probabilities" in text


# Strings.


WORDS = ["a b", "c", "b c d", "a"] * 3


@pytest.mark.parametrize(
    "given",
    [
        WORDS,
        np.array(WORDS),
        np.array(WORDS, object),
        tf.constant(WORDS),
        np.array(WORDS, "S"),
        np.array([[w] for w in WORDS], object),
    ],
    ids=["list", "array", "objects", "tensor", "bytes", "column"],
)
def test_strings_are_taken_as_in_keras(given):
    vectorize = layers.TextVectorization(max_tokens=10, output_sequence_length=4)
    vectorize.adapt(WORDS)
    parts = [vectorize, layers.Embedding(10, 2), layers.Flatten(), layers.Dense(1)]
    model = keras.Sequential([keras.Input((), dtype="string"), *parts])
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss="mse")
    flat = tf.reshape(tf.constant(WORDS), [-1])
    expected = model(flat)
    np.testing.assert_allclose(trainer.predict(given, verbose=0), expected, rtol=1e-5)
    assert trainer.fit(given, np.ones((12, 1)), verbose=0).history["loss"] == [
        pytest.approx(((expected.numpy() - 1) ** 2).mean(), rel=1e-5)
    ]


# Outputs of several lengths, and of a model with a state of one size.


def test_outputs_of_several_lengths_are_ragged():
    def make():
        for length in (5, 7, 5, 2):
            yield np.full((4, length, 2), length, "float32")

    data = tf.data.Dataset.from_generator(make, output_signature=tf.TensorSpec((None, None, 2)))
    outputs = looplab.Trainer(lambda x: {"x": x, "n": x[:, 0, 0]}).predict(data, verbose=0)
    assert [row.shape for row in outputs["x"]][::4] == [(5, 2), (7, 2), (5, 2), (2, 2)]
    assert outputs["n"].tolist() == [5.0] * 4 + [7.0] * 4 + [5.0] * 4 + [2.0] * 4


def test_rows_that_broadcast_against_a_state_are_an_error():
    state = tf.Variable(tf.zeros((8, 1)), trainable=False)
    kernel = tf.Variable(tf.ones((3, 1)))
    trainer = looplab.Trainer(lambda x: x @ kernel + state, optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match="the model returns 8 rows for a batch of 1: a stateful model"):
        trainer.predict(X[:17], batch_size=8, verbose=0)
    with pytest.raises(ValueError, match="The model returns 8 rows for a batch of as many as y has"):
        trainer.fit(X[:17], BITS[:17], batch_size=8, verbose=0)


# All that trains is saved.


def _cached():
    @functools.lru_cache
    def net():
        return dense()

    return net


def holders():
    """Where a network and an optimizer may be that no attribute of a trainer leads to."""

    def closure():
        net, optimizer = dense(), keras.optimizers.Adam(0.1)
        return lambda: net, lambda: optimizer

    def plain_object():
        box = types.SimpleNamespace(parts={"net": [dense()]}, optimizer=keras.optimizers.Adam(0.1))
        return lambda: box.parts["net"][0], lambda: box.optimizer

    def generator():
        net, optimizer = _cached(), functools.lru_cache(lambda: keras.optimizers.Adam(0.1))
        return net, optimizer

    def stack():
        things = iter([dense(), keras.optimizers.Adam(0.1)])
        kept = tuple(things)
        table = dict(enumerate(kept)).get
        return lambda: table(0), lambda: table(1)

    return {f.__name__: f for f in (closure, plain_object, generator, stack)}


@pytest.mark.parametrize(
    ("make", "by"), [*((make, "minimize") for make in holders().values()), (holders()["closure"], "apply")]
)
def test_what_is_trained_is_saved_though_no_attribute_leads_to_it(make, by, tmp_path):
    def run(epochs, log_dir, fails_at=None):
        keras.utils.set_random_seed(1)
        net, optimizer = make()
        counter = [tf.Variable(0.0, trainable=False)]

        def fail(epoch, logs):
            if epoch == fails_at:
                raise EOFError

        class Loop(looplab.Trainer):
            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((y - net()(x)) ** 2)
                variables = net().trainable_variables
                if by == "minimize":
                    self.minimize(tape, loss, variables, optimizer())
                else:
                    optimizer().apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
                counter[0].assign_add(1.0)
                return {"loss": loss, "count": counter[0] + 0.0}

        callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=fail)]
        trainer = Loop(log_dir=log_dir, seed=1)
        history = trainer.fit(
            X, BITS, batch_size=10, epochs=epochs, verbose=0, resume=True, callbacks=callbacks
        ).history
        return history, net().get_weights(), int(optimizer().iterations)

    whole = run(4, tmp_path / "whole")
    with pytest.raises(EOFError):
        run(4, tmp_path / "parts", 2)
    history, weights, iterations = run(4, tmp_path / "parts")
    assert (history, iterations) == (whole[0], 20)
    for one, other in zip(weights, whole[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bare_variable_that_is_trained_is_a_warning(recwarn):
    class Scaled(looplab.Trainer):
        def __init__(self, trainable, **options):
            super().__init__(**options)
            self.scale = tf.Variable(1.0, trainable=trainable)
            self.net = dense()

        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((y - self.scale * self.net(x)) ** 2)
            self.minimize(tape, loss)
            return {"loss": loss}

    for trainable in (True, False):
        trainer = Scaled(trainable, optimizer="sgd")
        for _ in range(2):
            trainer.fit(X, BITS, verbose=0)
        told = [str(w.message) for w in recwarn if "looplab trains scale, which Keras 3 would not" in str(w.message)]
        assert len(told) == trainable
        assert (float(trainer.scale) != 1.0) == trainable
        recwarn.clear()
