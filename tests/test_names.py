"""The names of a trainer: a subclass may use all but those that looplab needs, and those are refused by name."""

import keras
import numpy as np
import pytest

import looplab

X = np.linspace(0, 1, 8, dtype="float32").reshape(8, 1)
FREE = (
    *("_loss", "_metrics", "_engine", "_state", "_step", "_now", "_events", "_compiled", "_guard", "_traced"),
    *("loss", "loss_fn", "loss_weights", "engine", "state", "step", "epoch", "runner", "folder", "guard", "store"),
    *(
        "callbacks",
        "batch",
        "batch_size",
        "data",
        "writer",
        "variables",
        "layers",
        "name",
        "run",
        "train",
        "validation",
    ),
)


def trainer(kind, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    return kind(model, optimizer="sgd", loss="mse", metrics=["mae"], seed=0, **options)


def test_a_subclass_may_use_any_other_name(tmp_path):
    class Own(looplab.Trainer):
        def __init__(self, *args, **options):
            for name in FREE:
                setattr(self, name, f"before {name}")
            super().__init__(*args, **options)
            for name in FREE:
                setattr(self, name, f"after {name}")

    own, plain = trainer(Own, log_dir=tmp_path / "own"), trainer(looplab.Trainer, log_dir=tmp_path / "plain")
    histories = [one.fit(X, X, epochs=2, validation_data=(X, X), verbose=0).history for one in (own, plain)]
    assert histories[0] == histories[1]
    assert all(getattr(own, name) == f"after {name}" for name in FREE)
    resumed = trainer(Own, log_dir=tmp_path / "own")
    assert (
        resumed.fit(X, X, epochs=3, validation_data=(X, X), verbose=0, resume=True).history["loss"][:2]
        == (histories[0]["loss"])
    )


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "name",
    ["steps", "epochs", "skipped_steps", "log_dir", "seed", "metrics", "losses", "weights", "fit", "log", "save"],
)
def test_assigning_a_name_of_looplabs_is_refused_by_name(name, before):
    class Own(looplab.Trainer):
        def __init__(self, *args, **options):
            if before:
                setattr(self, name, [])
            super().__init__(*args, **options)
            setattr(self, name, [])

    with pytest.raises(AttributeError, match=f"`{name}` of `Own` belongs to looplab.*another name"):
        trainer(Own)


@pytest.mark.parametrize("name", ["steps", "metrics", "fit"])
def test_a_class_attribute_of_such_a_name_is_refused_too(name):
    with pytest.raises(TypeError, match=f"`{name}` of `Own` belongs to looplab"):
        type("Own", (looplab.Trainer,), {name: []})


def test_a_trainer_cannot_be_a_keras_model_too():
    with pytest.raises(TypeError, match="`Both` is a trainer and a Keras layer: subclass one of them"):
        type("Both", (looplab.Trainer, keras.Model), {})


def test_steps_and_properties_may_be_overridden():
    class Own(looplab.Trainer):
        @property
        def metrics(self):
            return [self.distance]

        def reset_metrics(self):
            super().reset_metrics()
            self.resets = getattr(self, "resets", 0) + 1

        def test_step(self, batch):
            self.distance.update_state(*batch)
            return {"distance": self.distance.result()}

    own = trainer(Own)
    own.distance = keras.metrics.MeanAbsoluteError(name="distance")
    assert own.evaluate(X, X + 1, batch_size=4, verbose=0) == {"distance": pytest.approx(1.0)}
    assert own.resets == 1
    own.train_step = lambda batch: {"loss": 0.0}
    assert own.fit(X, X, verbose=0).history == {"loss": [0.0]}
