"""Published Keras training steps end with the same weights and logs as in Keras's `fit`."""

import collections
import functools
import itertools

import keras
import numpy as np
import pytest

import looplab
from published import SYSTEMS

pytestmark = [
    pytest.mark.usefixtures("no_graph_rewrites"),
    pytest.mark.filterwarnings("ignore:.*compiled_(loss|metrics):UserWarning"),
]
EPOCHS = 3


def start():
    """Makes what is created next start from the same seeds and names."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


def values(weights):
    """The values by the end of the path, which does not have the name of an outer model, and by number."""
    by_path = collections.defaultdict(list)
    for weight in weights:
        if isinstance(weight, keras.Variable):  # Keras's `weights` has no `tf.Variable`s
            by_path["/".join(weight.path.split("/")[-2:])].append(keras.ops.convert_to_numpy(weight))
    return {(path, index): value for path, found in by_path.items() for index, value in enumerate(found)}


class BatchLogs(keras.callbacks.Callback):
    """Keeps the logs of each batch of the last epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.logs = {"": [], "val_": []}

    def on_train_batch_end(self, batch, logs=None):
        self.logs[""].append(dict(logs))

    def on_test_batch_end(self, batch, logs=None):
        self.logs["val_"].append(dict(logs))


def arguments(system):
    """Those of `fit` that Keras and looplab share."""
    # Only after the last epoch, because validation advances the random numbers of Keras's training.
    return {"validation_data": system.validation(), "validation_freq": EPOCHS} if system.validation else {}


@functools.cache
def keras_fit(system):
    """The weights and the last logs of Keras's `fit`; each system is trained once for its two tests."""
    start()
    model = system.model()
    model.jit_compile = False
    batches = BatchLogs()
    data, options = system.data(), arguments(system)
    history = model.fit(data, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=[batches], **options)
    logs = {name: results[-1] for name, results in history.history.items()}
    for name, (prefix, of_batches) in itertools.product(system.means, batches.logs.items()):
        if of_batches and name in of_batches[0]:
            logs[prefix + name] = np.mean([batch[name] for batch in of_batches])
    return values(model.weights), logs


def check(system, trainer):
    history = trainer.fit(system.data(), epochs=EPOCHS, verbose=0, **arguments(system)).history
    expected, logs = keras_fit(system)
    weights = values(trainer.weights)
    assert weights.keys() == expected.keys()
    for path, value in expected.items():
        assert np.isfinite(value).all(), path
        np.testing.assert_allclose(weights[path], value, rtol=0, atol=system.tolerance, err_msg=str(path))
    assert history.keys() == logs.keys()
    for name in logs.keys() - set(system.differing):
        np.testing.assert_allclose(history[name][-1], logs[name], rtol=1e-5, err_msg=name)


systems = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


@systems
def test_a_keras_model_is_used_as_it_is(system):
    keras_fit(system)
    start()
    check(system, looplab.Trainer(system.model()))


@systems
def test_the_step_works_in_a_trainer(system):
    keras_fit(system)
    start()
    check(system, system.trainer())
