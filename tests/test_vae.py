"""The VAE on real MNIST: against the hand-written loop, in TensorBoard, and to the bit for every loop length."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab
from looplab.recipes.vae import VAE, vae
from looplab.testing import read_images, read_scalars


@pytest.fixture(scope="module")
def images(data_dir):
    x = looplab.Data("mnist", str(data_dir)).load().x_train
    return x.reshape(len(x), -1) / np.float32(255)


@pytest.fixture(scope="module")
def two_epochs(data_dir, tmp_path_factory):
    """The main job: two epochs on all of MNIST."""
    log_dir = tmp_path_factory.mktemp("vae") / "run"
    looplab.run(vae, data=looplab.Data("mnist", str(data_dir)), epochs=2, log_dir=log_dir, verbose=0)
    return log_dir


def test_learns_as_published_and_writes_the_true_value_of_every_batch(two_epochs):
    history = json.loads((two_epochs / "history.json").read_text())
    train, validation = read_scalars(two_epochs / "train"), read_scalars(two_epochs / "validation")
    assert history["loss"][1] <= 0.0685  # published: 0.0677

    steps, loss = train["batch_loss"]
    np.testing.assert_array_equal(steps, np.arange(1, 1877))
    sizes = np.array(([64] * 937 + [32]) * 2)
    assert np.average(loss[938:], weights=sizes[938:]) == pytest.approx(history["loss"][1], abs=1e-5)
    assert np.std(loss) > 0.001  # a running mean would be smooth

    parts = {tag for tag in train if tag.startswith("batch_loss/")}
    assert parts == {"batch_loss/mse", "batch_loss/vae/kl"}
    np.testing.assert_allclose(sum(train[tag][1] for tag in parts), loss, rtol=1e-6)
    np.testing.assert_array_equal(train["batch_learning_rate"][1], np.float32(1e-3))

    for folder, name in ((train, "loss"), (validation, "val_loss")):
        np.testing.assert_array_equal(folder["epoch_loss"][0], [1, 2])
        np.testing.assert_allclose(folder["epoch_loss"][1], history[name], rtol=1e-6)
    np.testing.assert_array_equal(validation["batch_loss"][0], np.arange(1, 2 * 157 + 1))


def test_draws_pictures_each_epoch_as_files_and_in_tensorboard(two_epochs):
    shown = read_images(two_epochs / "train")
    for name, shape in {"reconstructions": (56, 280, 1), "prior": (280, 280, 1)}.items():
        assert [step for step, _ in shown[name]] == [1, 2]
        for step, (png,) in shown[name]:
            assert (two_epochs / "pictures" / f"{name}-{step:03d}.png").read_bytes() == png
            assert tf.io.decode_png(png).shape == shape


def test_tensorboard_serves_every_point(two_epochs, tensorboard):
    """The real server, as the README says to start it, asked over HTTP as its page asks."""
    with tensorboard(two_epochs, "--samples_per_plugin", "scalars=999999999") as ask:
        query = {"run": "train", "tag": "batch_loss"}
        points = json.loads(ask("scalars/scalars", ready=lambda answer: len(json.loads(answer)) >= 1876, **query))
    assert [step for _, step, _ in points] == list(range(1, 1877))


@pytest.fixture
def without_grappler():
    """Else TensorFlow rearranges what a graph computes by what surrounds it, and the last bits differ."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def hand_written(model, batches):
    """The loop as published, without looplab: trains `model`, and returns the loss of each batch."""
    optimizer = keras.optimizers.Adam(1e-3)
    mse = keras.losses.MeanSquaredError()

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            loss = mse(batch, model(batch))
            loss += sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
        return loss

    return [float(step(batch)) for batch in batches]


@pytest.mark.parametrize("grappler", [True, False])
def test_computes_what_the_loop_written_by_hand_computes(images, grappler, request, tmp_path):
    if not grappler:
        request.getfixturevalue("without_grappler")
    batches = tf.data.Dataset.from_tensor_slices(images).batch(64).take(200)
    keras.utils.set_random_seed(5)
    by_hand = VAE()
    losses = hand_written(by_hand, batches)
    keras.utils.set_random_seed(5)
    model = VAE()
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.Adam(1e-3), loss="mse", log_dir=tmp_path / "run")
    trainer.fit(batches.map(lambda x: (x, x)), verbose=0)

    ours = read_scalars(tmp_path / "run" / "train")["batch_loss"][1]
    weights, expected = (np.concatenate([w.ravel() for w in m.get_weights()]) for m in (model, by_hand))
    if grappler:
        assert np.linalg.norm(weights - expected) <= 1e-5 * np.linalg.norm(expected)
    else:
        np.testing.assert_array_equal(weights, expected)
        np.testing.assert_array_equal(ours, np.float32(losses))


def bits(images, seed=0, validate_at=None, **options):
    """The history and final weights of two epochs of 20 batches, the last of them ragged."""
    keras.utils.set_random_seed(seed)
    trainer = looplab.Trainer(VAE(), optimizer="adam", loss="mse", metrics=["mae"], seed=seed, **options)

    def validate(batch, logs):
        if batch == validate_at:
            trainer.evaluate(images[-300:], images[-300:])

    callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=validate)] if validate_at is not None else []
    part, held_out = images[:1250], (images[1250:1500], images[1250:1500])
    history = trainer.fit(part, part, batch_size=64, epochs=2, verbose=0, validation_data=held_out, callbacks=callbacks)
    return history.history, b"".join(weight.tobytes() for weight in trainer.get_weights())


def test_loop_length_and_validation_in_mid_epoch_never_change_a_bit(images):
    reference = bits(images, steps_per_execution=1)
    for steps in (7, "auto"):
        assert bits(images, steps_per_execution=steps) == reference
    assert bits(images, steps_per_execution=7, validate_at=8) == reference
    other_history, other_weights = bits(images, seed=1)
    assert other_history != reference[0]
    assert other_weights != reference[1]
