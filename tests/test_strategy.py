"""Training on two devices, and errors for what cannot be distributed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.testing import assert_resume_exact, read_scalars


def trained(scope, x, y, log_dir, **options):
    keras.utils.set_random_seed(0)
    with scope:
        hidden = layers.Dense(8, "relu", kernel_regularizer="l2", activity_regularizer="l2", name="hidden")
        model = keras.Sequential([hidden, layers.Dense(1)], name="net")  # built by its first step
        trainer = looplab.Trainer(
            model,
            optimizer=keras.optimizers.Adam(0.01),
            loss="mse",
            metrics=["mae"],
            seed=0,
            log_dir=log_dir,
            **options,
        )
    history = trainer.fit(x, y, batch_size=20, epochs=3, verbose=0, validation_data=(x, y)).history
    return trainer, history


def test_two_replicas_compute_what_one_computes(line, tmp_path, two_devices):
    one, expected = trained(contextlib.nullcontext(), *line, tmp_path / "one")
    two, history = trained(two_devices.scope(), *line, tmp_path / "two")
    assert two.strategy.num_replicas_in_sync == 2
    assert set(history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(two.predict(line[0]), one.predict(line[0]), atol=1e-4)
    points = [read_scalars(tmp_path / name / "train") for name in ("one", "two")]
    assert set(points[0]) == set(points[1])
    np.testing.assert_allclose(points[1]["batch_loss"][1], points[0]["batch_loss"][1], rtol=1e-3)


def test_a_last_batch_may_leave_a_replica_without_rows(line, two_devices):
    x, y = (np.concatenate([part, part[:1]]) for part in line)
    trainer, history = trained(two_devices.scope(), x, y, None)
    assert all(np.isfinite(values).all() for values in history.values())
    assert trainer.predict(x).shape == (101, 1)
    assert trainer.evaluate(x, y)["mae"] == pytest.approx(float(np.mean(np.abs(trainer.predict(x) - y))), rel=1e-4)


def test_two_replicas_resume_to_the_same_bits(line, two_devices):
    x, y = (part[:25] for part in line)  # one replica has no rows of the last batch

    class Noise(layers.Layer):  # from Keras's own generator
        def call(self, x):
            return x + 0.1 * keras.random.normal(tf.shape(x))

    def build(**options):
        with two_devices.scope():
            inner = [
                layers.Dense(8, "relu"),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                Noise(),
                layers.Dense(1),
            ]
            trainer = looplab.Trainer(
                keras.Sequential(inner), optimizer=keras.optimizers.Adam(), loss="mse", metrics=["mae"], **options
            )
        return looplab.Recipe(trainer, (x, y), validation=(x, y), epochs=2, batch_size=24)

    assert_resume_exact(build, 2)  # in mid-epoch, and after an epoch


def dense(**options):
    """A trainer of one layer."""
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    return looplab.Trainer(net, **{"optimizer": "sgd", "loss": "mse", "seed": 0, **options})


def processes(script, tmp_path, configs):
    """What processes print that run a script, each with a TF_CONFIG."""
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(Path(looplab.__file__).parent.parent), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(file), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env={**environment, "TF_CONFIG": config}, **pipes) for config in configs]
    try:
        return [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()


def cluster(workers, task="worker", index=0):
    """A TF_CONFIG."""
    ports = []
    for _ in range(workers):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            ports.append(f"127.0.0.1:{one.getsockname()[1]}")
    return {"cluster": {"worker": ports}, "task": {"type": task, "index": index}}


def test_parameter_servers_are_an_error(tmp_path):
    script = """
        import json, os
        import tensorflow as tf
        workers = json.loads(os.environ.pop("TF_CONFIG"))["cluster"]["worker"]
        jobs = ("worker", "ps", "chief")
        cluster = tf.train.ClusterSpec({job: [address] for job, address in zip(jobs, workers)})
        servers = [tf.distribute.Server(cluster, job_name=job, protocol="grpc") for job in jobs[:2]]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
        strategy = tf.distribute.ParameterServerStrategy(resolver)
        import looplab
        with strategy.scope():
            try:
                looplab.Trainer(loss="mse")
            except ValueError as error:
                print(error)
        os._exit(0)  # the servers do not end
    """
    (printed,) = processes(script, tmp_path, [json.dumps(cluster(3))])
    assert "`ParameterServerStrategy` is not supported: create the trainer in the scope of a `tf.dist" in printed


def test_central_storage_is_an_error():
    with (
        tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"]).scope(),
        pytest.raises(
            ValueError, match="`CentralStorageStrategy` is not supported: create the trainer in the scope of a"
        ),
    ):
        dense()


def test_workers_that_would_each_train_alone_are_an_error(monkeypatch, two_devices):
    for scope in (contextlib.nullcontext(), two_devices.scope()):
        monkeypatch.setenv("TF_CONFIG", json.dumps(cluster(2)))
        with scope, pytest.raises(ValueError, match="TF_CONFIG names 2 workers, and each of them would train alone"):
            dense()
    for config in (cluster(1), cluster(2, "evaluator"), {}):
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        dense()
    monkeypatch.setenv("TF_CONFIG", "{worker: 1}")
    with pytest.raises(ValueError, match="TF_CONFIG is malformed: Expecting property name"):
        dense()


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: tf.distribute.MirroredStrategy(["CPU:0"]),
        lambda: tf.distribute.OneDeviceStrategy("CPU:1"),
        tf.distribute.MultiWorkerMirroredStrategy,
    ],
)
def test_one_replica_computes_what_no_strategy_computes(line, tmp_path, strategy):
    """To the bit; and its checkpoints are the same."""

    def run(scope, name):
        keras.utils.set_random_seed(0)
        with scope:
            inner = [layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)]
            trainer = looplab.Trainer(
                keras.Sequential(inner), optimizer="adam", loss="mse", metrics=["mae"], seed=0, log_dir=tmp_path / name
            )
        history = trainer.fit(*line, epochs=2, verbose=0, validation_data=line).history
        return trainer, history, trainer.evaluate(*line, verbose=0), trainer.predict(line[0], verbose=0).tolist()

    one, *expected = run(contextlib.nullcontext(), "one")
    other, *found = run(strategy().scope(), "other")
    assert found == expected
    other.restore(max((tmp_path / "one" / "checkpoints").iterdir()))
    assert other.evaluate(*line, verbose=0) == expected[1]
    assert one.strategy is not other.strategy


def test_what_another_strategy_distributes_is_an_error(line, two_devices):
    class Counted(looplab.Trainer):
        def __init__(self, metric, **options):
            net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
            super().__init__(net, loss="mse", seed=0, **options)
            self.metric = metric

    def trainer(model=False, optimizer=False, metric=False, own=True):
        """Each argument says whether the part is created in the scope."""

        def scope(inside):
            return two_devices.scope() if inside else contextlib.nullcontext()

        with scope(optimizer):
            adam = keras.optimizers.Adam()
        with scope(metric):
            mean = keras.metrics.Mean("seen")
        with scope(model):
            net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        with scope(own):
            counted = Counted(mean, optimizer=adam)
            counted.model = net
        return counted

    every = {"model", "optimizer", "metric", "own"}
    inside = r"in the scope of a `MirroredStrategy` of 2 replicas"
    outside = "outside of any strategy's scope"
    for part in ("model", "optimizer", "metric"):
        for parts, places in ((every - {part}, (outside, inside)), ({part}, (inside, outside))):
            wrong = trainer(**{name: name in parts for name in every})
            match = f"`{part}` was created {places[0]}, and the trainer {places[1]}: see the variable .*/"
            for call in (wrong.fit, wrong.evaluate):
                with pytest.raises(ValueError, match=match):
                    call(*line, verbose=0)
            assert wrong.steps == 0
    trainer(**dict.fromkeys(every, True)).fit(*line, verbose=0)
    trainer(**dict.fromkeys(every, False)).fit(*line, verbose=0)


def test_a_trainer_has_the_strategy_of_its_model(line, tmp_path, two_devices):
    """As in Keras, where only the model is created and compiled in the scope."""
    found = []
    for is_inside in (True, False):
        keras.utils.set_random_seed(0)
        with two_devices.scope():
            net = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(1)])
            net.compile("adam", "mse", metrics=["mae"])
            if is_inside:
                trainer = looplab.Trainer(net, seed=0)
        if not is_inside:
            trainer = looplab.Trainer(net, seed=0, log_dir=tmp_path / "run")
        assert trainer.strategy is two_devices
        history = trainer.fit(*line, epochs=2, verbose=0, validation_data=line).history
        found.append((history, trainer.evaluate(*line, verbose=0), trainer.predict(line[0], verbose=0).tolist()))
    assert found[0] == found[1]
    trainer = looplab.Trainer(net, seed=0, log_dir=tmp_path / "run")
    trainer.fit(*line, epochs=2, verbose=0, resume=True, validation_data=line)
    assert trainer.evaluate(*line, verbose=0) == found[0][1]
    other = looplab.Trainer(net, optimizer=keras.optimizers.Adam(), seed=0)
    with pytest.raises(ValueError, match="`optimizer` was created outside of any strategy's scope, and the trainer in"):
        other.fit(*line, verbose=0)


def test_accumulated_gradients_of_several_replicas_are_an_error(line, two_devices):
    with two_devices.scope():
        trainer = dense(optimizer=keras.optimizers.SGD(gradient_accumulation_steps=3))
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` of `optimizer` is 3, which Keras supports on"):
        trainer.fit(*line, verbose=0)
    trainer.evaluate(*line, verbose=0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_continues_on_another_number_of_replicas(line, tmp_path, two_devices, before, after):
    """In mid-epoch, when each replica has its own part of the metrics, and of the optimizer's counter."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.steps == 6:
                raise KeyboardInterrupt

    def create(replicas, log_dir):
        keras.utils.set_random_seed(0)
        with two_devices.scope() if replicas == 2 else contextlib.nullcontext():
            checkpoint = {"log_dir": log_dir, "checkpoint": looplab.Checkpoint(every=1)} if log_dir else {}
            return dense(optimizer=keras.optimizers.Adam(0.1), metrics=["mae"], **checkpoint)

    def fit(trainer, **options):
        return trainer.fit(*line, batch_size=20, epochs=3, verbose=0, validation_data=line, **options).history

    expected = fit(create(after, None))
    with pytest.raises(KeyboardInterrupt):
        fit(create(before, tmp_path), callbacks=[Stop()])
    trainer = create(after, tmp_path)
    with pytest.warns(UserWarning, match=f"there were {before} replicas, and now {after}: the run continues, but not"):
        history = fit(trainer, resume=True)
    assert trainer.steps == 15
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


def test_fit_in_the_scope_swaps_averaged_weights(line, tmp_path, two_devices):
    """As in Keras's own test of `SwapEMAWeights`; a checkpoint has the averages."""

    def run(scope, name):
        keras.utils.set_random_seed(0)
        (tmp_path / name).mkdir()
        with scope:
            net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
            net.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), "mse", metrics=["mae"])
            callbacks = [
                keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
                keras.callbacks.ModelCheckpoint(tmp_path / name / "m_{epoch}.keras"),
            ]
            trainer = looplab.Trainer(net, seed=0)
            history = trainer.fit(
                *line, batch_size=20, epochs=2, verbose=0, callbacks=callbacks, validation_data=line
            ).history
            saved = [keras.models.load_model(tmp_path / name / f"m_{epoch}.keras") for epoch in (1, 2)]
        return history, [one.get_weights() for one in [*saved, net]], trainer.evaluate(*line, verbose=0)

    expected, weights, values = run(contextlib.nullcontext(), "one")
    history, other_weights, other_values = run(two_devices.scope(), "two")
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5, err_msg=name)
    for one, other in zip(weights, other_weights, strict=True):
        np.testing.assert_allclose(
            np.concatenate([w.ravel() for w in other]), np.concatenate([w.ravel() for w in one]), rtol=1e-5
        )
    assert other_values == pytest.approx(values, rel=1e-5)
    assert history["val_mae"][-1] == pytest.approx(other_values["mae"], rel=1e-5)


def test_each_fit_reads_a_distributed_dataset_from_its_start(line, two_devices):
    with two_devices.scope():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.0), loss="mse")
    dataset = tf.data.Dataset.from_tensor_slices(line).batch(20).repeat()
    first, second = (
        trainer.fit(two_devices.experimental_distribute_dataset(dataset), steps_per_epoch=2, verbose=0).history["loss"]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer])
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_the_build_of_an_optimizer_assigns_is_assigned_once(line, two_devices, replicas, wrap):
    """Keras's `ScheduleFreeAdamW` starts from the weights."""

    def weights(builds, **options):
        keras.utils.set_random_seed(0)
        with two_devices.scope() if replicas == 2 else contextlib.nullcontext():
            model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
            optimizer = wrap(keras.optimizers.ScheduleFreeAdamW(0.05))
            if builds:
                optimizer.build(model.trainable_variables)
            trainer = looplab.Trainer(model, optimizer=optimizer, loss="mse", **options)
        trainer.fit(*line, batch_size=20, epochs=2, shuffle=False, verbose=0)
        return trainer.get_weights()

    for options in ({}, {"run_eagerly": True}):
        for one, other in zip(weights(False, **options), weights(True, **options), strict=True):
            np.testing.assert_array_equal(one, other)


class Direct(looplab.Trainer):
    """Calls a Keras loss and the optimizer itself, as published steps do."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.error = keras.losses.MeanSquaredError()

    def train_step(self, batch):
        x, y = batch[:2]
        with tf.GradientTape() as tape:
            loss = self.error(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Mean(looplab.Trainer):
    """Computes a mean over what it takes for the batch; logs a gradient."""

    def train_step(self, batch):
        x, y = batch[:2]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        self.log("norm", tf.linalg.global_norm(self.minimize(tape, loss)))
        return {"loss": loss}


class OwnStep(keras.Model):
    """A Keras model with a step of its own, and losses that layers add."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential(
            [layers.Dense(8, "tanh", activity_regularizer="l2", kernel_regularizer="l2"), layers.Dense(1)]
        )

    def call(self, x):
        return self.inner(x)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True), sample_weight)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def assert_replicas_equal_one_device(two_devices, create, *data, run_eagerly=False, **options):
    """Trains on one device and on two; weights and history must be equal but for rounding. Returns both trainers."""
    found, trainers = [], []
    for scope in (contextlib.nullcontext(), two_devices.scope()):
        keras.utils.set_random_seed(0)
        with scope:
            trainer = create()
        trainer.run_eagerly = run_eagerly
        trainers.append(trainer)
        history = trainer.fit(*data, batch_size=24, epochs=4, verbose=0, **options).history
        found.append((history, np.concatenate([weight.ravel() for weight in trainer.get_weights()])))
    (expected, weights), (history, others) = found
    assert set(history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(others, weights, atol=2e-6)
    return trainers


def regression(kind=looplab.Trainer, **options):
    def create():
        net = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1)])
        return kind(net, seed=0, **{name: value() for name, value in options.items()})

    return create


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        (looplab.Trainer, lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, clipnorm=0.1))),
        (Direct, lambda: keras.optimizers.Adam(0.01, clipnorm=0.1)),
        (Mean, lambda: keras.optimizers.Adam(0.01)),
    ],
)
def test_rows_weigh_the_same_on_whatever_replica(line, two_devices, kind, optimizer):
    """Three batches of 24 rows and one of 1, with none for a replica."""
    loss = {"loss": lambda: "mse"} if kind is looplab.Trainer else {}
    x, y = (part[:73] for part in line)
    weights = {"sample_weight": np.linspace(0.1, 3, 73).astype("float32")} if loss else {}
    assert_replicas_equal_one_device(two_devices, regression(kind, optimizer=optimizer, **loss), x, y, **weights)


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("rows", [73, 96])
def test_losses_are_reduced_over_the_whole_batch(line, two_devices, reduction, rows):
    x, y = (part[:rows] for part in line)
    create = regression(
        optimizer=lambda: keras.optimizers.SGD(0.002), loss=lambda: keras.losses.MeanSquaredError(reduction=reduction)
    )
    weights = np.linspace(0.1, 3, rows).astype("float32")
    assert_replicas_equal_one_device(two_devices, create, x, y, sample_weight=weights)


def test_masked_positions_count_over_the_whole_batch(two_devices):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 5, size=(73, 7))
    tokens[:60, 3:] = 0  # which the mask leaves out

    def create():
        hidden = [layers.Embedding(5, 3, mask_zero=True), layers.GRU(4, return_sequences=True), layers.Dense(1)]
        return looplab.Trainer(keras.Sequential([keras.Input((7,)), *hidden]), optimizer="adam", loss="mse", seed=0)

    y = random.normal(size=(73, 7, 1)).astype("float32")
    assert_replicas_equal_one_device(two_devices, create, tokens, y)


class Padded(layers.Layer):
    """Rows of up to 4 numbers as dense ones."""

    def call(self, rows):
        return rows.to_tensor(shape=(None, 4))

    def compute_output_shape(self, shape):
        return shape[0], 4


@pytest.mark.parametrize("as_arrays", [True, False])
def test_ragged_rows_are_shared_among_replicas(line, two_devices, as_arrays):
    x, y = (part[:73] for part in line)
    ragged = tf.RaggedTensor.from_tensor(x, lengths=np.arange(73) % 4 + 1)

    def create():
        net = keras.Sequential([keras.Input((None,), ragged=True), Padded(), layers.Dense(8, "tanh"), layers.Dense(1)])
        return looplab.Trainer(net, optimizer="adam", loss="mse", seed=0)

    if as_arrays:
        assert_replicas_equal_one_device(two_devices, create, ragged, y)
    else:
        data = tf.data.Dataset.from_tensor_slices((ragged, y)).batch(24)
        found = []
        for scope in (contextlib.nullcontext(), two_devices.scope()):
            keras.utils.set_random_seed(0)
            with scope:
                found.append(create().fit(data, epochs=2, verbose=0).history["loss"])
        np.testing.assert_allclose(*found, rtol=2e-5)


class Total(keras.metrics.Metric):
    """Whose result is its variable."""

    def __init__(self, name="total"):
        super().__init__(name=name)
        self.sum = self.add_weight(name="sum", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.sum.assign_add(tf.reduce_sum(tf.abs(y_true - y_pred)))

    def result(self):
        return self.sum


def test_a_result_may_be_the_variable_of_a_metric(line, two_devices):
    create = regression(optimizer=lambda: "sgd", loss=lambda: "mse", metrics=lambda: [Total()])
    x, y = (part[:73] for part in line)
    for trainer in assert_replicas_equal_one_device(two_devices, create, x, y):
        expected = np.abs(trainer.predict(x, verbose=0) - y).sum()
        assert trainer.evaluate(x, y, batch_size=24, verbose=0)["total"] == pytest.approx(expected, rel=1e-5)


def test_the_own_step_of_a_model_trains_as_on_one_device(line, two_devices):
    def create():
        model = OwnStep()
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.1), "mse")
        return looplab.Trainer(model, seed=0)

    x, y = (part[:73] for part in line)
    assert_replicas_equal_one_device(two_devices, create, x, y, sample_weight=np.linspace(0.1, 3, 73))


def test_xla_is_an_error_on_several_devices(line, two_devices):
    with two_devices.scope():
        trainer = dense(jit_compile=True)
    with pytest.raises(ValueError, match="`jit_compile` is True, which TensorFlow supports on one device only"):
        trainer.fit(*line, verbose=0)


class Noisy(looplab.Trainer):
    """Draws from the trainer's generator, in an inner `tf.function`, from Keras's generator, and for dropout masks."""

    def __init__(self, **options):
        super().__init__(keras.Sequential([keras.Input((4,)), layers.Dense(1)]), seed=0, **options)
        self.drop = layers.Dropout(0.5, seed=1)
        on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        self.seen = tf.Variable(tf.zeros((2, 46)), trainable=False, **on_read)

    @tf.function
    def normal(self):
        return keras.random.normal((2,), seed=self.seed_generator)

    def drawn(self):
        kept = self.drop(tf.ones((40,)), training=True)
        drawn = [keras.random.normal((2,), seed=self.seed_generator), self.normal(), keras.random.normal((2,))]
        return tf.concat([*drawn, kept], 0)

    def train_step(self, batch):
        own = tf.one_hot(tf.distribute.get_replica_context().replica_id_in_sync_group, 2)
        self.seen.assign(own[:, None] * self.drawn())
        return {"loss": tf.reduce_mean(self(batch))}

    def test_step(self, batch):
        return {"drawn": tf.reduce_mean(self.drawn())}

    def predict_step(self, batch):
        return self.drawn() + tf.zeros_like(batch)[:, :1]


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_each_replica_draws_numbers_of_its_own(line, two_devices, run_eagerly):
    """From one seed; and the generators stay equal, so that the number of replicas may change."""
    found = []
    for _ in range(2):
        with two_devices.scope():
            trainer = Noisy(run_eagerly=run_eagerly)
        trainer.fit(line[0], batch_size=20, verbose=0)
        found.append(
            (trainer.seen.numpy(), trainer.predict(line[0][:2], verbose=0), trainer.evaluate(line[0], verbose=0))
        )
    for one, other in zip(*found, strict=True):
        np.testing.assert_equal(other, one)
    for first, second in (found[0][0], found[0][1]):
        assert not np.isin(first[:6], second[:6]).any()
        assert set(first[6:]) == set(second[6:]) == {0, 2}
        assert 8 <= np.sum(first[6:] != second[6:]) <= 32  # of 40
    for variable in (trainer.seed_generator.state, trainer.drop.seed_generator.state):
        one, other = (part.numpy().tolist() for part in variable.value.values)
        assert one == other
        assert one[1] >= 5
    if not run_eagerly:
        paths = trainer._looplab.runner.variables.by_path()
        assert [path for path in paths if "stray" in path] == ["stray/0/replica-0", "stray/0/replica-1"]


def test_evaluation_leaves_generators_of_tensorflow_alone(line, two_devices):
    class Drawing(looplab.Trainer):
        def test_step(self, batch):
            return {"drawn": tf.reduce_mean(generator.normal((1,)))}

    with two_devices.scope():
        generator = tf.random.Generator.from_seed(1)
        trainer = Drawing()
    before = [part.numpy().tolist() for part in generator.state.values]
    assert trainer.evaluate(line[0], verbose=0) == trainer.evaluate(line[0], verbose=0)
    assert [part.numpy().tolist() for part in generator.state.values] == before


class Tracking(looplab.Trainer):
    """Has a mean of the loss and a moving mean of the inputs, as published steps do."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.mean = keras.metrics.Mean("mean")
        self.center = tf.Variable(tf.zeros(4), trainable=False)

    def train_step(self, batch):
        x, y = batch[:2]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x - self.center, training=True) - y))
        self.minimize(tape, loss)
        self.mean.update_state(loss)
        self.center.assign(0.9 * self.center + 0.1 * tf.reduce_mean(x, 0))
        return {"loss": self.mean.result()}

    def test_step(self, batch):
        self.mean.update_state(tf.reduce_mean(tf.square(self(batch[0] - self.center) - batch[1])))
        return {"loss": self.mean.result()}


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_means_that_a_step_updates_count_by_rows(line, two_devices, run_eagerly):
    """Also of a batch of 1 row, of which the mean on the other replica is NaN."""
    x, y = (part[:73] for part in line)
    create = regression(Tracking, optimizer=lambda: keras.optimizers.SGD(0.05))
    one, two = assert_replicas_equal_one_device(
        two_devices, create, x, y, validation_data=(x, y), run_eagerly=run_eagerly
    )
    for part in two.center.values:
        np.testing.assert_allclose(part, one.center, rtol=2e-6)


@pytest.mark.parametrize("lazily", [False, True])
def test_moving_statistics_are_those_of_all_rows(line, two_devices, lazily):
    """Of batches of 24, 24 and 1 rows, of which a replica has none: as by hand, and equal on all replicas."""
    x, y = (part[:49] for part in line)
    with two_devices.scope():
        norm = layers.BatchNormalization(momentum=0.9)
        frozen = layers.BatchNormalization(trainable=False)
        inputs = [] if lazily else [keras.Input((4,))]
        trainer = looplab.Trainer(
            keras.Sequential([*inputs, norm, frozen, layers.Dense(1)]), optimizer="sgd", loss="mse"
        )
    trainer.build(x, y)
    frozen.moving_mean.assign([0.1, 0.2, 0.3, 0.4])
    trainer.fit(x, y, batch_size=24, shuffle=False, verbose=0)
    mean, variance = np.zeros(4), np.ones(4)
    for batch, shares in ((x[:24], 2), (x[24:48], 2), (x[48:], 1)):
        mean = 0.9 * mean + 0.1 * batch.mean(0)
        variance = 0.9 * variance + 0.1 * np.mean([part.var(0) for part in np.split(batch, shares)], 0)
    for index in range(2):
        np.testing.assert_allclose(norm.moving_mean.value.values[index], mean, rtol=1e-5)
        np.testing.assert_allclose(norm.moving_variance.value.values[index], variance, rtol=1e-5)
        assert frozen.moving_mean.value.values[index].numpy().tolist() == frozen.moving_mean.numpy().tolist()
    np.testing.assert_equal(frozen.moving_mean.numpy(), np.float32([0.1, 0.2, 0.3, 0.4]))
    assert np.isfinite(trainer.predict(x, verbose=0)).all()


def test_synchronized_normalization_is_that_of_one_device(line, two_devices):
    def create():
        inner = [layers.BatchNormalization(synchronized=True), layers.Dense(8, "tanh")]
        inner += [layers.BatchNormalization(synchronized=True), layers.Dense(1)]
        net = keras.Sequential([keras.Input((4,)), *inner])
        return looplab.Trainer(net, optimizer=keras.optimizers.SGD(0.05), loss="mse", seed=0)

    x, y = (part[:73] for part in line)
    assert_replicas_equal_one_device(two_devices, create, x, y, validation_data=(x, y))


def test_the_states_of_rows_stay_on_their_replica(two_devices):
    x = np.random.default_rng(0).normal(size=(32, 5, 3)).astype("float32")
    with two_devices.scope():
        inner = layers.GRU(2, stateful=True)
        net = keras.Sequential([keras.Input((5, 3), batch_size=4), inner, layers.Dense(1)])
        trainer = looplab.Trainer(net, optimizer="adam", loss="mse", seed=0)
    data = tf.data.Dataset.from_tensor_slices((x, x[:, 0, :1])).batch(8, drop_remainder=True)
    trainer.fit(data, verbose=0)
    first, second = (part.numpy() for part in inner.states[0].value.values)
    assert not np.isclose(first, second).any()
