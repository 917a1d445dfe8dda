"""Names and settings of Keras mean on a trainer what they mean in Keras."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

L, M = keras.layers, keras.metrics
random = np.random.default_rng(0)
x, y = (random.normal(size=(20, n)).astype("float32") for n in (4, 1))
labels = random.integers(0, 3, 20)
one_hot = np.eye(3, dtype="float32")[labels]


@pytest.fixture(autouse=True)
def _no_limits():
    yield
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


def compiled(**options):
    keras.utils.set_random_seed(0)
    layers = L.Dense(3, "tanh", name="hidden"), L.BatchNormalization(name="norm"), L.Dense(1, name="last")
    model = keras.Sequential([keras.Input((4,)), *layers], name="named")
    model.compile(**{"optimizer": "sgd", "loss": "mse", "metrics": ["mae"], "run_eagerly": True, **options})
    return model


def classifier():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, "softmax")])
    model.compile(loss="categorical_crossentropy", metrics=[M.F1Score(name="f1")], run_eagerly=True)
    return model


@pytest.fixture
def trainer():
    trainer = looplab.Trainer(compiled())
    trainer.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return trainer


# Names.


def test_the_attributes_of_the_model_are_those_of_the_trainer(trainer):
    model = trainer.model
    for name in ("layers", "inputs", "outputs", "input_shape", "output_shape", "dtype_policy", "name"):
        assert getattr(trainer, name) == getattr(model, name), name
    assert trainer.get_layer("hidden") is trainer.get_layer(index=0) is model.layers[0]
    assert trainer.count_params() == model.count_params()
    for name in ("trainable_weights", "trainable_variables", "weights"):
        assert list(map(id, getattr(trainer, name))) == list(map(id, getattr(model, name))), name
    ours, theirs = ({id(v) for v in one.non_trainable_variables} for one in (trainer, model))
    assert ours >= {id(v) for v in model.non_trainable_weights}
    assert not ours & {id(v) for v in model.trainable_weights}
    assert theirs >= {id(v) for v in model.non_trainable_weights}


@pytest.mark.parametrize("convert", [np.asarray, tf.constant, tf.Variable, keras.Variable])
def test_a_call_outside_a_step_takes_what_the_model_takes(trainer, convert):
    np.testing.assert_array_equal(trainer(convert(x)), trainer.model(convert(x)))


def test_the_loss_and_the_metrics_have_their_values(trainer):
    outputs = trainer.predict(x, verbose=0)
    squares = (outputs - y) ** 2
    np.testing.assert_allclose(trainer.loss(y, outputs), np.mean(squares), 1e-5)
    np.testing.assert_allclose(trainer.compiled_loss(y, outputs), np.mean(squares), 1e-5)
    weights = random.uniform(size=20).astype("float32")
    np.testing.assert_allclose(trainer.compiled_loss(y, outputs, weights), np.mean(squares[:, 0] * weights), 1e-5)
    model = compiled()
    logs = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    results = trainer.get_metrics_result()
    assert sorted(results) == sorted(model.get_metrics_result()) == sorted(logs)
    for name, values in logs.items():
        np.testing.assert_allclose(results[name], values[-1], 1e-5, err_msg=name)
    trainer.reset_metrics()
    assert float(trainer.get_metrics_result()["mae"]) == 0


def test_compiled_metrics_are_those_of_a_step():
    class Tracking(looplab.Trainer):
        def train_step(self, batch):
            given, target = batch
            with tf.GradientTape() as tape:
                outputs = self(given, training=True)
                loss = self.compiled_loss(target, outputs)
            self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
            self.compiled_metrics.update_state(target, outputs)
            return {"loss": loss, **self.compiled_metrics.result()}

    trainer, model = Tracking(compiled()), compiled()
    for first in (0, 8):
        model.reset_metrics()
        theirs = model.train_on_batch(x[first : first + 8], y[first : first + 8], return_dict=True)
        ours = trainer.train_on_batch(x[first : first + 8], y[first : first + 8], return_dict=True)
        assert sorted(ours) == sorted(theirs)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, 1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "alternative"),
    [("compile", "its constructor"), ("add_loss", "in a layer"), ("built", "call `build`"), ("no_such", "its model")],
)
def test_a_name_that_a_trainer_does_not_have_names_the_alternative(trainer, name, alternative):
    with pytest.raises(AttributeError, match=f"A trainer has no `{name}`.*{alternative}"):
        getattr(trainer, name)
    assert not hasattr(trainer, name)


def test_get_layer_lists_the_layers(trainer):
    with pytest.raises(ValueError, match=r"there are \['hidden', 'norm', 'last'\]"):
        trainer.get_layer("other")


def test_a_subclass_may_define_call_instead_of_a_model():
    class Linear(looplab.Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense = L.Dense(1, name="dense")

        def call(self, given, training=False):
            return self.dense(given)

    trainer = Linear(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    assert trainer.fit(x, x[:, :1], epochs=30, verbose=0).history["loss"][-1] < 0.1
    np.testing.assert_allclose(trainer.predict(x, verbose=0), trainer.dense(x), 1e-5)
    assert [layer.name for layer in trainer.layers] == ["dense"]


@pytest.mark.parametrize("takes_training", [True, False])
def test_compute_loss_learns_whether_it_trains(takes_training):
    class Marked(looplab.Trainer):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight) + (100.0 if training else 0.0)

    class Old(looplab.Trainer):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return super().compute_loss(x, y, y_pred, sample_weight) + 100.0

    trainer = (Marked if takes_training else Old)(compiled())
    assert trainer.train_on_batch(x, y, return_dict=True)["loss"] > 100
    assert (trainer.test_on_batch(x, y, return_dict=True)["loss"] > 100) == (not takes_training)


# What passes return, and when they end.


@pytest.mark.parametrize("make", [compiled, classifier])
def test_values_in_a_list_have_keras_order(make):
    target = y if make is compiled else one_hot
    model, trainer = make(), looplab.Trainer(make())
    ours = trainer.evaluate(x, target, batch_size=8, verbose=0, return_dict=False)
    theirs = model.evaluate(x, target, batch_size=8, verbose=0)
    assert isinstance(ours, list)
    for mine, value in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, value, 1e-5)


def test_a_metric_of_any_shape_is_in_the_history_as_in_keras_and_has_a_curve_for_each_entry(tmp_path):
    model, trainer = classifier(), looplab.Trainer(classifier(), log_dir=tmp_path)
    options = {"batch_size": 8, "epochs": 2, "shuffle": False, "validation_data": (x, one_hot), "verbose": 0}
    theirs, ours = (each.fit(x, one_hot, **options).history for each in (model, trainer))
    assert sorted(ours) == sorted(theirs)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], 1e-5, err_msg=name)
    for folder, prefix in (("train", ""), ("validation", "val_")):
        curves = looplab.read_scalars(tmp_path / folder)
        for entry in range(3):
            steps, values = curves[f"epoch_f1/{entry}"]
            assert steps.tolist() == [1, 2]
            np.testing.assert_allclose(values, np.array(theirs[f"{prefix}f1"])[:, entry], 1e-5)
            assert len(curves[f"batch_f1/{entry}"][0]) == 6


class Stopping(keras.callbacks.Callback):
    """Ends an evaluation or a prediction after its second batch."""

    def on_test_batch_end(self, batch, logs=None):
        self.model.stop_evaluating = batch == 1

    def on_predict_batch_end(self, batch, logs=None):
        self.model.stop_predicting = batch == 1


def test_a_callback_ends_an_evaluation_and_a_prediction(trainer):
    options = {"batch_size": 4, "verbose": 0}
    for each in (trainer, trainer.model):
        stopped = each.predict(x, callbacks=[Stopping()], **options)
        assert len(stopped) == 8
        loss = each.evaluate(x, y, callbacks=[Stopping()], **options, return_dict=True)["loss"]
        np.testing.assert_allclose(loss, np.mean((stopped - y[:8]) ** 2), 1e-5)
        assert len(each.predict(x, **options)) == 20  # the next one is complete


@pytest.mark.filterwarnings("ignore:Limiting", "ignore:.*is limited to", "ignore:Your input ran out")
@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (9, 5)])
def test_keras_limits_shorten_every_pass_and_lengthen_none(limit, batches):
    keras.config.set_max_epochs(2)
    keras.config.set_max_steps_per_epoch(limit)
    model, trainer = compiled(), looplab.Trainer(compiled())
    options = {"batch_size": 4, "epochs": 5, "shuffle": False, "validation_data": (x, y), "verbose": 0}
    ours, theirs = (each.fit(x, y, **options).history for each in (trainer, model))
    assert (trainer.epochs, trainer.steps) == (2, 2 * batches)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], 1e-5, err_msg=name)
    for each in (trainer, model):
        assert len(each.predict(x, batch_size=4, verbose=0)) == 4 * batches
        outputs = model.predict_on_batch(x[: 4 * batches])
        loss = each.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)["loss"]
        np.testing.assert_allclose(loss, np.mean((outputs - y[: 4 * batches]) ** 2), 1e-5)


class Quarters(keras.utils.PyDataset):
    """The examples in batches of 4."""

    def __len__(self):
        return len(x) // 4

    def __getitem__(self, index):
        return x[4 * index : 4 * index + 4], y[4 * index : 4 * index + 4]


SOURCES = {
    "generator": lambda: ((x[first : first + 4], y[first : first + 4]) for first in range(0, len(x), 4)),
    "endless generator": lambda: ((x[:4] + number, y[:4]) for number in itertools.count()),
    "dataset": lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
    "endless dataset": lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(4).repeat(),
    "PyDataset": Quarters,
}


@pytest.mark.filterwarnings("ignore:Limiting", "ignore:.*is limited to", "ignore:.*shuffle=True")
@pytest.mark.parametrize("source", SOURCES)
def test_keras_limits_keep_the_first_batches_of_any_data(source):
    keras.config.set_max_steps_per_epoch(3)
    make, (model, trainer) = SOURCES[source], (compiled(), looplab.Trainer(compiled()))
    theirs, ours = (each.fit(make(), shuffle=False, verbose=0).history for each in (model, trainer))
    assert trainer.steps == 3
    np.testing.assert_allclose(ours["loss"], theirs["loss"], 1e-5)
    loss = model.evaluate(make(), verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(trainer.evaluate(make(), verbose=0)["loss"], loss, 1e-5)
    np.testing.assert_allclose(trainer.predict(make(), verbose=0), model.predict(make(), verbose=0), 1e-5)
