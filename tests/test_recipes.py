"""The published systems: sizes, short runs of each, saving, and what must be equal to the bit."""

import contextlib
import functools
import importlib
import io
import json
import math
import pkgutil
import re
import subprocess
import sys
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab
import looplab.recipes
from looplab.recipes.images import ConvBlock, ImageTrainer, heavy_augmentation, light_augmentation
from looplab.recipes.logistic_endpoint import LogisticEndpoint
from looplab.recipes.mini_inception import DownsampleModule, InceptionModule, MiniInception
from looplab.recipes.preact_resnet import PreActBlock
from looplab.recipes.resnet_like import ResBlock
from looplab.recipes.three_apis import Subclass, three_apis
from looplab.recipes.vae import KLDivergence, Sampling, vae
from looplab.testing import read_images, read_scalars

pytest.importorskip("sklearn", reason="needs the extra `report`: pip install 'looplab[report]'")

NAMES = [module.name for module in pkgutil.iter_modules(looplab.recipes.__path__) if module.name != "__main__"]
MODULES = {name: importlib.import_module(f"looplab.recipes.{name}") for name in NAMES}
RECIPES = {name: getattr(module, name) for name, module in MODULES.items() if hasattr(module, name)}
# Each recipe as it is, and in the other ways in which the same can be written: name and flags.
VARIANTS = ["cifar10 --model class", "three_apis --api subclass", "vae --api functional"]
CASES = [*RECIPES, *VARIANTS]
CLASSIFIERS = [case for case in CASES if not case.startswith("vae")]
LIMIT, BATCH_SIZE, STEPS = 256, 96, 3  # the last batch is ragged
SLOW = ("mini_googlenet", "mini_inception", "preact_resnet", "resnet_like")  # to trace: seconds each time


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs the command line of a case, once: its `folder`, `recipe`, and what it `printed`."""

    @functools.cache
    def train(case):
        name, *flags = case.split()
        made = []

        @functools.wraps(RECIPES[name])
        def recipe(**options):
            made.append(RECIPES[name](**options))
            return made[-1]

        folder = tmp_path_factory.mktemp("runs") / "run"
        flags += f"--dataset digits --limit {LIMIT} --batch-size {BATCH_SIZE} --epochs 1".split()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            looplab.main(recipe, [*flags, "--log-dir", str(folder), "--plot", str(folder.parent / "plot.png")])
        return types.SimpleNamespace(folder=folder, recipe=made[0], printed=printed.getvalue())

    return train


def parsed(text):
    """What a summary shows: (by layer, its first output shape and its parameters; the three counts)."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    layers = {row[0].split(" ")[0]: (whole_numbers(row[1]), *whole_numbers(row[2])) for row in rows if row[2]}
    counts = [int(count.replace(",", "")) for count in re.findall(r"params: ([\d,]+)", text)]
    return layers, tuple(counts)


def whole_numbers(text):
    return tuple(int(number) for number in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d)", "", text)))


# Sizes.

COUNTS = {
    "cifar10": (328_586, 328_586, 0),
    "cnn_blocks": (1_097_098, 1_096_650, 448),
    "logistic_endpoint --height 1 --width 3": (40, 40, 0),
    "mini_googlenet": (1_656_250, 1_652_826, 3_424),
    "mini_inception": (1_656_250, 1_652_826, 3_424),
    "mini_vggnet": (1_085_418, 1_084_138, 1_280),
    "mlp": (239_178, 239_178, 0),
    "preact_resnet": (175_898, 174_874, 1_024),
    "resnet_like": (2_400_490, 2_397_418, 3_072),
    "shallow_net": (328_586, 328_586, 0),
    "three_apis": (20_426, 20_234, 192),
    "three_apis --api functional": (20_426, 20_234, 192),
    "three_apis --api subclass": (20_426, 20_234, 192),
    "vae": (107_472, 107_472, 0),
    "vae --api functional": (107_472, 107_472, 0),
}
INCEPTION_BLOCKS = [
    ((32, 32, 96), 3_072),
    ((32, 32, 64), 31_040),
    ((32, 32, 80), 30_096),
    ((15, 15, 160), 58_000),
    ((15, 15, 160), 87_840),
    ((15, 15, 160), 108_320),
    ((15, 15, 160), 128_800),
    ((15, 15, 144), 146_640),
    ((7, 7, 240), 124_896),
    ((7, 7, 336), 389_520),
    ((7, 7, 336), 544_656),
    ((1, 1, 336), 0),
    ((336,), 0),
    ((10,), 3_370),
]
CONVOLUTIONS = {"conv_1": (13, 13, 32), "pooling": (4, 4, 32), "conv_2": (2, 2, 64), "classes": (10,)}
SHAPES = {
    "resnet_like": {
        "block_1": (14, 14, 64),
        "block_2": (7, 7, 256),
        "block_3": (3, 3, 512),
        "average": (512,),
        "classes": (10,),
    },
    "preact_resnet": {
        "first": (28, 28, 16),
        **{f"stage_1_{block}": (28, 28, 16) for block in (1, 2)},
        **{f"stage_2_{block}": (14, 14, 32) for block in (1, 2)},
        **{f"stage_3_{block}": (7, 7, 64) for block in (1, 2)},
        "classes": (10,),
    },
    **{f"three_apis --api {api}": CONVOLUTIONS for api in ("sequential", "functional", "subclass")},
    "cnn_blocks": {
        **{f"block_{filters}": (28, 28, filters) for filters in (32, 64, 128)},
        "flatten": (28 * 28 * 128,),
        "classes": (10,),
    },
    "vae": {"sampling": (32,), "decoder": (784,)},
    "logistic_endpoint --height 1 --width 3": {"dense": (10,), "endpoint": (10,)},
}


@pytest.fixture
def _no_data(tmp_path, monkeypatch):
    """Reading a data set other than the embedded one fails."""
    monkeypatch.setenv("LOOPLAB_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_each_recipe_has_a_count():
    assert {case.split()[0] for case in COUNTS} == set(RECIPES)


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize("case", COUNTS)
def test_size_without_data(case, trained, capsys, tmp_path):
    name, *flags = case.split()
    if case in SLOW and case != "mini_inception":
        trained(case).recipe.trainer.summary()
    else:
        looplab.main(RECIPES[name], [*flags, "--summary"])
    layers, counts = parsed(capsys.readouterr().out)
    assert counts == COUNTS[case]
    assert sum(parameters for _, parameters in layers.values()) == counts[0]
    if case == "mini_inception":
        assert list(layers.values()) == INCEPTION_BLOCKS
    expected = SHAPES.get(case, {})
    assert {name: layers[name][0] for name in expected} == expected
    assert list(tmp_path.iterdir()) == []


# A short run of each.


@pytest.mark.parametrize("case", CASES)
def test_run_leaves_all_it_promises(case, trained):
    run = trained(case)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["recipe"] == "looplab.recipes.{0}:{0}".format(case.split()[0])
    assert config["data_source"]["name"] == "digits"
    assert config["data_source"]["test_examples"] == LIMIT
    history = json.loads((run.folder / "history.json").read_text())
    assert history == run.recipe.trainer.history.history
    assert {"loss", "val_loss"} <= set(history)
    assert np.isfinite(list(history.values())).all()
    steps, losses = read_scalars(run.folder / "train")["batch_loss"]
    assert steps.tolist() == [1, 2, 3] == list(range(1, STEPS + 1))
    assert np.isfinite(losses).all()
    assert read_scalars(run.folder / "validation")["batch_loss"][0].tolist() == [1, 2, 3]
    curves = (run.folder / "curves.png").read_bytes()
    assert curves == (run.folder.parent / "plot.png").read_bytes()
    assert tf.io.decode_png(curves).shape[2] == 3
    assert str(run.folder) in run.printed


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_run_reports_on_the_test_images(case, trained):
    run = trained(case)
    history = json.loads((run.folder / "history.json").read_text())
    report = json.loads((run.folder / "report.json").read_text())
    assert report["classes"] == [str(digit) for digit in range(10)] == list(report["per_class"])
    support = [row["support"] for row in report["per_class"].values()]
    labels = looplab.Data("digits", limit=LIMIT).load().y_test
    assert support == np.bincount(labels, minlength=10).tolist()
    assert sum(map(sum, report["confusion_matrix"])) == LIMIT
    assert report["accuracy"] == pytest.approx(history["val_accuracy"][-1]) or case == "logistic_endpoint"
    assert (run.folder / "report.txt").read_text() in run.printed + "\n"
    shown = read_images(run.folder / "train")
    for name, epoch in {"samples": 0, "confusion_matrix": 1}.items():
        assert [at for at, _ in shown[name]] == [epoch]
        assert shown[name][0][1] == [(run.folder / f"{name}.png").read_bytes()]


def write_png(path, image):
    path.write_bytes(tf.io.encode_png(image if image.ndim == 3 else image[..., None]).numpy())
    return str(path)


@pytest.mark.parametrize("case", [case for case in CLASSIFIERS if case not in SLOW])
def test_predicts_the_class_of_pictures_as_the_trained_recipe(case, trained, tmp_path, capsys):
    run = trained(case)
    original, scaled = looplab.Data("digits").load((8, 8)).x_test, run.recipe.data.x_test
    pictures = [write_png(tmp_path / "a.png", original[0]), write_png(tmp_path / "b.png", scaled[1])]
    name, *flags = case.split()
    flags += ["--dataset", "digits", "--weights", str(run.folder / "model.weights.h5"), "--predict", *pictures]
    looplab.main(RECIPES[name], flags)
    probabilities = run.recipe.predict(scaled[:2])
    assert probabilities.shape == (2, 10)
    if case != "logistic_endpoint":  # ten separate questions
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    expected = zip(pictures, probabilities, strict=True)
    lines = [f"{picture}: {row.argmax()} {row.max():.4f}\n" for picture, row in expected]
    assert capsys.readouterr().out == "".join(lines)


# Saving.


def inputs_of(recipe, count=4):
    """The first inputs of a recipe's model, for inference."""
    if isinstance(recipe.train, dict):
        return {"inputs": tf.constant(recipe.train["inputs"][:count])}
    images = recipe.train[0][:count]
    return tf.constant(images / np.float32(255) if images.dtype == np.uint8 else images)


def with_seeds_of(model, other):
    """`other` draws the random numbers that `model` draws next; Keras does not save the state of its seeds."""

    def seeds(model):
        return [variable for variable in model.variables if "seed_generator" in variable.path]

    for one, same in zip(seeds(model), seeds(other), strict=True):
        same.assign(one)
    return other


@pytest.mark.parametrize("case", CASES)
def test_weights_into_a_fresh_model_give_the_same_bits(case, trained):
    run = trained(case)
    name, *flags = case.split()
    options = {flag.strip("-"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    fresh = RECIPES[name](data=looplab.Data("digits", limit=4), **options)
    model, other, x = run.recipe.trainer.model, fresh.trainer.model, inputs_of(run.recipe)
    assert not np.array_equal(other(x), with_seeds_of(other, model)(x))  # and it is built
    fresh.trainer.load_weights(run.folder / "model.weights.h5")
    np.testing.assert_array_equal(with_seeds_of(model, other)(x), model(x))


@pytest.mark.parametrize("case", CASES)
def test_keras_file_gives_the_same_bits_and_trains_on(case, trained, tmp_path):
    recipe = trained(case).recipe
    model, x = recipe.trainer.model, inputs_of(recipe)
    recipe.trainer.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(with_seeds_of(model, loaded)(x), model(x))

    before = loaded.get_weights()
    options = {"optimizer": "sgd", "run_eagerly": True}  # a trace takes longer than one step
    if isinstance(x, dict):
        trainer, batch = looplab.Trainer(loaded, **options), {**x, "targets": recipe.train["targets"][:4]}
    else:
        trainer, batch = looplab.Trainer(loaded, loss="mse", **options), (x, tf.ones_like(model(x)))
    history = trainer.fit(tf.data.Dataset.from_tensors(batch), verbose=0).history
    assert trainer.steps == 1
    assert np.isfinite(history["loss"]).all()
    assert any(not np.array_equal(one, other) for one, other in zip(loaded.get_weights(), before, strict=True))


def test_keras_file_of_a_functional_model_loads_without_warnings(trained, tmp_path):
    trained("mini_googlenet").recipe.trainer.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.models.load_model(tmp_path / "model.keras")


def test_keras_file_of_mixed_precision_gives_the_same_bits(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = Subclass()
    finally:
        keras.config.set_dtype_policy("float32")
    x = tf.random.uniform((4, 28, 28, 3))
    outputs = model(x)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), outputs)


SERVE = """
import sys
import numpy as np
import tensorflow as tf
for folder in sys.argv[1:]:
    inputs = {name: tf.constant(value) for name, value in np.load(folder + "/inputs.npz").items()}
    model = tf.saved_model.load(folder)
    np.save(folder + "/outputs.npy", model.serve(inputs if "inputs" in inputs else inputs["images"]))
assert "looplab" not in sys.modules
"""


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """By case: (what another process, which knows only TensorFlow, made of an exported model; what the model makes)."""
    folders, expected = {}, {}
    for case in [case for case in CASES if not case.startswith("cifar10")]:  # which has models of other recipes
        recipe, folders[case] = trained(case).recipe, tmp_path_factory.mktemp("exported")
        model, x = recipe.trainer.model, inputs_of(recipe)
        options = {}
        if isinstance(x, dict):  # without the targets that it was built with
            options["input_signature"] = [{"inputs": tf.TensorSpec((None, *x["inputs"].shape[1:]))}]
        recipe.trainer.export(folders[case], verbose=False, **options)
        expected[case] = tf.function(model)(x).numpy()
        np.savez(folders[case] / "inputs.npz", **(x if isinstance(x, dict) else {"images": x}))
    command = [sys.executable, "-c", SERVE, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folders["vae"])
    assert done.returncode == 0, done.stderr
    return {case: (np.load(folder / "outputs.npy"), expected[case]) for case, folder in folders.items()}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("cifar10")])
def test_exported_model_gives_the_same_bits_elsewhere(case, served):
    if case.startswith("vae"):  # TensorFlow rearranges how the noise is scaled and added: one unit in the last place
        np.testing.assert_allclose(*served[case], rtol=0, atol=2e-7)
    else:
        np.testing.assert_array_equal(*served[case])


@pytest.mark.parametrize("name", ["three_apis --api subclass", "vae", "cnn_blocks"])
def test_weights_into_a_model_that_is_not_built(name, trained):
    run = trained(name)
    options = {"api": "subclass"} if "subclass" in name else {}
    fresh = RECIPES[name.split()[0]](data=looplab.Data("digits", limit=4), **options)
    with pytest.raises(ValueError, match=r"There are no weights to load yet: call `build`|has not yet been built"):
        fresh.trainer.load_weights(run.folder / "model.weights.h5")


@pytest.mark.parametrize(
    ("kind", "arguments", "shapes"),
    [
        (
            ConvBlock,
            {"filters": 3, "kernel_size": 1, "strides": 2, "padding": "valid", "kernel_initializer": "he_normal"},
            [(2, 9, 9, 3)],
        ),
        (InceptionModule, {"filters_1x1": 2, "filters_3x3": 3, "kernel_initializer": "he_normal"}, [(2, 9, 9, 3)]),
        (DownsampleModule, {"filters": 2, "kernel_initializer": "he_normal"}, [(2, 9, 9, 3)]),
        (ResBlock, {"filters": [2, 3, 4]}, [(2, 9, 9, 3)]),
        (PreActBlock, {"filters": 4, "strides": 2}, [(2, 9, 9, 3)]),
        (Sampling, {"seed": 5}, [(2, 3), (2, 3)]),
        (KLDivergence, {"weight": 0.25}, [(2, 3), (2, 3)]),
        (LogisticEndpoint, {}, [(2, 3)]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_config_of_a_layer_keeps_name_dtype_and_arguments(kind, arguments, shapes, dtype):
    layer = kind(**arguments, name="mine", dtype=dtype)
    config = json.loads(json.dumps(layer.get_config()))
    assert {name: config[name] for name in arguments} == arguments
    for again in (
        kind.from_config(layer.get_config()),
        keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))),
    ):
        assert type(again) is kind
        assert (again.name, again.dtype_policy.name) == ("mine", dtype)
        assert again.get_config() == layer.get_config()
        inputs = [tf.random.stateless_uniform(shape, [1, 2]) for shape in shapes]
        outputs = layer(*inputs)
        again(*inputs)
        again.set_weights(layer.get_weights())
        if kind is Sampling:
            outputs, inputs = kind(**arguments, dtype=dtype)(*inputs), inputs
            again = kind.from_config(layer.get_config())
        for one, same in zip(tf.nest.flatten(outputs), tf.nest.flatten(again(*inputs)), strict=True):
            assert one.dtype == same.dtype == again.compute_dtype
            np.testing.assert_array_equal(one, same)
        assert [float(loss) for loss in again.losses] == [float(loss) for loss in layer.losses]


# The same net in other words.


def twenty_steps(recipe, log_dir):
    """The losses and the weights after each of 20 steps of 32."""
    x, y = recipe.train
    recipe.trainer.fit(x, y, batch_size=32, verbose=0)
    losses = read_scalars(log_dir / "train")["batch_loss"][1]
    assert losses.shape == (20,)
    return losses, recipe.trainer.get_weights()


def same_bits(ours, theirs):
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, same in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(one, same)


def test_three_apis_give_the_same_bits(tmp_path):
    results, start = [], None
    for api in ("sequential", "functional", "subclass"):
        keras.utils.set_random_seed(7)  # of dropout
        options = {"seed": 7, "log_dir": tmp_path / api}
        recipe = three_apis(data=looplab.Data("digits", limit=640), api=api, **options)
        recipe.build()
        start = start or recipe.trainer.get_weights()
        recipe.trainer.set_weights(start)
        results.append(twenty_steps(recipe, tmp_path / api))
    same_bits(results[0], results[1])
    same_bits(results[0], results[2])
    assert any(not np.array_equal(one, other) for one, other in zip(results[0][1], start, strict=True))


def test_functional_and_subclassed_vae_give_the_same_bits(tmp_path):
    results, first = [], None
    for api in ("subclass", "functional"):
        recipe = vae(data=looplab.Data("digits", limit=640), api=api, seed=7, log_dir=tmp_path / api)
        recipe.build()
        first = first or recipe.trainer.model
        if not results:
            start = recipe.trainer.get_weights()
            noise = first.get_layer("sampling").seed_generator.state.numpy()
        recipe.trainer.set_weights(start)
        recipe.trainer.model.get_layer("sampling").seed_generator.state.assign(noise)
        results.append(twenty_steps(recipe, tmp_path / api))
    same_bits(*results)


# Against the loop written by hand.


@contextlib.contextmanager
def without_grappler():
    """Else TensorFlow rearranges what a graph computes by what surrounds it, and the last bits differ."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def hand_written(model, batches, log_dir):
    """The loop as published, without looplab: trains `model`, and returns the metrics."""
    optimizer = keras.optimizers.Adam()
    loss_function = keras.losses.SparseCategoricalCrossentropy()
    train_loss, train_accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()
    test_loss, test_accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()
    writer = tf.summary.create_file_writer(str(log_dir))

    @tf.function
    def train_step(step, images, labels):
        with tf.GradientTape() as tape:
            predictions = model(images, training=True)
            loss = loss_function(labels, predictions)
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
        train_loss.update_state(loss)
        train_accuracy.update_state(labels, predictions)
        with writer.as_default():
            tf.summary.scalar("loss", train_loss.result(), step=step)
            tf.summary.scalar("accuracy", train_accuracy.result(), step=step)

    @tf.function
    def test_step(images, labels):
        predictions = model(images, training=False)
        test_loss.update_state(loss_function(labels, predictions))
        test_accuracy.update_state(labels, predictions)

    for step, (images, labels) in enumerate(batches, 1):
        train_step(tf.constant(step, tf.int64), images, labels)
    for images, labels in batches:
        test_step(images, labels)
    logs = {"loss": train_loss, "accuracy": train_accuracy, "val_loss": test_loss, "val_accuracy": test_accuracy}
    return {name: float(metric.result()) for name, metric in logs.items()}


def test_mini_inception_computes_what_the_loop_written_by_hand_computes(tmp_path):
    digits = looplab.Data("digits", limit=24).load((32, 32, 3))
    images, labels = digits.x_train / np.float32(255), digits.y_train.astype("int32")
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)

    def by_hand():
        keras.utils.set_random_seed(5)
        model = MiniInception()
        return hand_written(model, batches, tmp_path), flat(model)

    def by_trainer():
        keras.utils.set_random_seed(5)
        model = MiniInception()
        loss = keras.losses.SparseCategoricalCrossentropy()
        trainer = looplab.Trainer(model, optimizer=keras.optimizers.Adam(), loss=loss, metrics=["accuracy"])
        history = trainer.fit(batches, validation_data=batches, verbose=0).history
        return {name: values[0] for name, values in history.items()}, flat(model)

    def flat(model):
        return np.concatenate([weight.ravel() for weight in model.get_weights()])

    with without_grappler():
        expected_logs, expected = by_hand()
        logs, weights = by_trainer()
    np.testing.assert_array_equal(weights, expected)
    assert {name: logs[name] for name in expected_logs} == pytest.approx(expected_logs, rel=1e-4)


# 16 bits.


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(precision, tmp_path):
    data = looplab.Data("digits", limit=256)
    recipe = looplab.run(three_apis, data=data, batch_size=64, precision=precision, log_dir=tmp_path / "run", verbose=0)
    assert keras.config.dtype_policy().name == "float32"
    scaled = any(isinstance(o, keras.optimizers.LossScaleOptimizer) for o in recipe.trainer.optimizers.values())
    assert scaled == (precision == "mixed_float16")
    losses = read_scalars(tmp_path / "run" / "train")["batch_loss"][1]
    assert losses[0] == pytest.approx(math.log(10), abs=0.7)
    assert losses[-1] < losses[0]
    assert recipe.trainer.history.history["loss"] == pytest.approx([losses.mean()], rel=1e-3)
    layers = {layer.name: layer for layer in recipe.trainer.model.layers}
    assert layers["conv_2"].compute_dtype == precision.removeprefix("mixed_")
    assert {variable.dtype for variable in recipe.trainer.model.weights} == {"float32"}
    assert recipe.trainer.model(inputs_of(recipe)).dtype == tf.float32
    assert recipe.predict(recipe.data.x_test[:2]).dtype == np.float32
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == precision


def test_unknown_precision_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="mixed_bfloat16, mixed_float16; got 'half'"):
        looplab.run(three_apis, data=looplab.Data("digits"), precision="half", log_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Augmentation.


@pytest.mark.parametrize("augmentation", [heavy_augmentation, light_augmentation])
def test_augmentation_changes_images_in_training_alone(augmentation):
    digits = looplab.Data("digits", limit=64).load((32, 32, 3)).x_train
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype("uint8")
    for images in (digits, noise, 255 * (noise > 127).astype("uint8")):
        trainer = ImageTrainer(tf.identity, augmentation(), loss="mse")
        plain = images / np.float32(255)
        np.testing.assert_allclose(trainer.predict(images, verbose=0), plain, rtol=1e-6)
        assert trainer.evaluate(images, plain, verbose=0)["loss"] < 1e-12
        changed = trainer(images, training=True)
        assert changed.dtype == tf.float32
        assert changed.shape == images.shape
        assert 0 <= np.min(changed) <= np.max(changed) <= 1
        same = [np.allclose(one, other, atol=1e-3) for one, other in zip(changed, plain, strict=True)]
        assert np.mean(same) < 0.1
        assert not np.array_equal(trainer(images, training=True), changed)


def test_augmentation_follows_the_seed_and_not_the_length_of_loops(tmp_path):
    def losses(seed, **options):
        keras.utils.set_random_seed(seed)
        data = looplab.Data("digits", limit=320)
        log_dir = tmp_path / f"{seed} {options}"
        recipe = RECIPES["shallow_net"](data=data, log_dir=log_dir, seed=seed, **options)
        keras.utils.set_random_seed(0)
        recipe.trainer.set_weights([0.01 * np.random.normal(size=w.shape) for w in recipe.trainer.get_weights()])
        recipe.trainer.fit(*recipe.train, batch_size=64, epochs=2, verbose=0, shuffle=False)
        return read_scalars(log_dir / "train")["batch_loss"][1].tolist()

    reference = losses(1, steps_per_execution=1)
    assert len(reference) == 10
    assert losses(1, steps_per_execution=3) == reference
    assert losses(2) != reference


# Validation on a part of the training images, and the list of recipes.


def test_the_fast_plan_rises_and_falls_over_the_whole_run():
    recipe = RECIPES["mini_inception"](data=looplab.Data("digits", limit=256), plan="fast", epochs=5)
    optimizer = recipe.trainer.optimizer
    rates = []
    for step in range(11):  # ten steps of 128 images
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates[:3] == pytest.approx([0, 0.05, 0.1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_validation_split_leaves_the_test_images_for_the_report_and_verbose_0_prints_nothing(tmp_path, capfd):
    data = looplab.Data("digits", limit=200, validation_split=0.25)
    recipe = looplab.run(RECIPES["mlp"], data=data, epochs=1, log_dir=tmp_path / "run", verbose=0)
    assert capfd.readouterr() == ("", "")
    described = json.loads((tmp_path / "run" / "config.json").read_text())["data_source"]
    assert [described[f"{part}_examples"] for part in ("training", "validation", "test")] == [150, 50, 200]
    whole = looplab.Data("digits").load((16, 8))
    np.testing.assert_array_equal(recipe.train[0], whole.x_train[:150])
    np.testing.assert_array_equal(recipe.validation[0], whole.x_train[150:200])
    np.testing.assert_array_equal(recipe.validation[1], whole.y_train[150:200])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    probabilities, labels = recipe.predict(whole.x_test[:200]), whole.y_test[:200]
    support = [row["support"] for row in report["per_class"].values()]
    assert support == np.bincount(labels).tolist()
    assert report["accuracy"] == pytest.approx(np.mean(probabilities.argmax(axis=1) == labels))
    values = recipe.trainer.evaluate(*recipe.validation, verbose=0)
    assert values["accuracy"] == pytest.approx(recipe.trainer.history.history["val_accuracy"][-1])


def test_config_has_what_the_plan_chose(trained):
    config = json.loads((trained("mini_inception").folder / "config.json").read_text())
    assert (config["epochs"], config["batch_size"]) == (1, BATCH_SIZE)
    assert config["optimizers"]["optimizer"]["learning_rate"] == pytest.approx(1e-3)


def test_diverging_training_ends_with_one_line_and_no_report(tmp_path, capsys):
    flags = f"--dataset digits --limit 64 --epochs 3 --learning-rate 1e38 --log-dir {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as caught:
        looplab.main(RECIPES["mlp"], flags.split())
    assert caught.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: The loss is not finite, at step \d of the training|is not finite", error), error
    assert "smaller learning rate" in error
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"nonfinite", "checkpoints"} <= left
    assert not left & {"report.json", "history.json", "model.weights.h5"}
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert (timings["steps"], timings["finished_epochs"]) == (timings["total_steps"], 0)


def test_results_of_another_run_are_not_written_over(tmp_path, capsys):
    (tmp_path / "history.json").write_text("precious")
    with pytest.raises(SystemExit) as caught:
        looplab.main(RECIPES["mlp"], ["--dataset", "digits", "--log-dir", str(tmp_path)])
    assert caught.value.code == 2
    assert "has the history.json of another run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.parametrize(
    "flags", ["--validation-split 1.5", "--validation-split 0.999 --limit 4", "--plot .", "--limit 0"]
)
def test_what_cannot_be_is_one_clear_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        looplab.main(RECIPES["mlp"], [*flags.split(), "--dataset", "digits", "--log-dir", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert re.search(r"error: .*(validation_split|plot|limit)", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_images_to_report_on_are_checked_before_anything_is_trained():
    arrays = looplab.Data("digits", limit=4).load()
    trainer = looplab.Trainer(keras.Sequential([keras.layers.Dense(1)]))
    floats = arrays._replace(x_train=arrays.x_train / 255)
    with pytest.raises(ValueError, match="uint8 images and one whole number for each; got x_train of float64"):
        looplab.Recipe(trainer, (floats.x_train, arrays.y_train), data=floats, predict=trainer.predict)
    with pytest.raises(ValueError, match="must be the images and labels to report on; got None"):
        looplab.Recipe(trainer, (arrays.x_train, arrays.y_train), predict=trainer.predict)


def test_list_of_recipes(tmp_path):
    command = [sys.executable, "-m", "looplab.recipes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == sorted(RECIPES)
    assert all(described.endswith(".") or "." in described for _, described in lines)


# What a user can get wrong.


def refusal(recipe, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        looplab.main(RECIPES[recipe], flags)
    stdout, stderr = capsys.readouterr()
    assert (caught.value.code, stdout) == (2, "")
    assert "Traceback" not in stderr
    error = stderr[stderr.index("error: ") :]
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("recipe", "flags", "text"),
    [
        ("mlp", "--predict picture.png", "--weights FILE"),
        ("mlp", "DIGITS --predict text.png", "text.png is not a picture"),
        ("mlp", "DIGITS --predict empty.png", "empty.png is not a picture"),
        ("mlp", "DIGITS --predict cut.png", "cut.png is not a picture"),
        ("mlp", "DIGITS --predict picture.png no.png", "no.png cannot be read: No such file or directory"),
        ("mlp", "DIGITS --predict .", ". cannot be read: Is a directory"),
        ("shallow_net", "DIGITS --predict picture.png", "`weights` WEIGHTS does not fit this recipe's models"),
        (
            "mlp",
            "--weights WEIGHTS --predict picture.png",
            "`weights` WEIGHTS was trained on digits: pass --dataset digits",
        ),
        ("mlp", "--weights no.weights.h5 --predict picture.png", "ends in .weights.h5; got no.weights.h5"),
        ("mlp", "--weights text.weights.h5 --predict picture.png", "`weights` text.weights.h5"),
        ("vae", "DIGITS --predict picture.png", "recipe `vae` is not a classifier: it has no `predict`"),
    ],
)
def test_predictions_that_cannot_be_made(recipe, flags, text, trained, tmp_path, monkeypatch, capsys):
    weights = str(trained("mlp").folder / "model.weights.h5")
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "picture.png", np.zeros((8, 8), "uint8"))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "picture.png").read_bytes()[:40])
    (tmp_path / "text.weights.h5").write_text("no weights")
    flags = flags.replace("DIGITS", "--dataset digits --weights WEIGHTS").replace("WEIGHTS", weights)
    assert text.replace("WEIGHTS", weights) in refusal(recipe, flags.split(), capsys)


def test_pictures_of_any_size_and_kind(trained, tmp_path, capsys):
    random = np.random.default_rng(0)
    files = {"grey.png": (50, 40, 1), "alpha.png": (8, 90, 4), "grey_alpha.png": (30, 30, 2), "colour.png": (9, 7, 3)}
    for name, shape in files.items():
        write_png(tmp_path / name, random.integers(0, 256, shape).astype("uint8"))
    photograph = random.integers(0, 256, (200, 300, 3)).astype("uint8")
    (tmp_path / "photograph.jpg").write_bytes(tf.io.encode_jpeg(photograph).numpy())
    pictures = [str(tmp_path / name) for name in (*files, "photograph.jpg")]
    for recipe in ("mlp", "shallow_net"):  # grey and coloured
        weights = str(trained(recipe).folder / "model.weights.h5")
        looplab.main(RECIPES[recipe], ["--dataset", "digits", "--weights", weights, "--predict", *pictures])
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(": ")[0] for line in lines] == pictures
        assert all(re.fullmatch(r"\d [01]\.\d{4}", line.partition(": ")[2]) for line in lines)


WITHOUT_EXTRA = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        return None if name.split(".")[0] in ("sklearn", "matplotlib") else self.finder.find_spec(name, *more)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]

import looplab
from looplab.recipes.mlp import mlp

flags = "--dataset digits --limit 64 --epochs 1 --verbose 0 --log-dir run".split()
try:
    looplab.main(mlp, [*flags, "--plot", "plot.png"])
except SystemExit as error:
    print("status", error.code, flush=True)
looplab.main(mlp, flags)
assert not {"sklearn", "matplotlib"} & set(sys.modules)
"""


def test_without_the_extra_it_trains_and_says_what_to_install(tmp_path):
    command = [sys.executable, "-c", WITHOUT_EXTRA]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stdout.splitlines()
    assert first == "status 2"  # before anything was trained: else the second run finds its folder taken
    assert "error: `plot` needs matplotlib and scikit-learn: pip install 'looplab[report]'." in done.stderr
    assert "pip install 'looplab[report]'" in second
    assert "looplab[report]" not in "".join(rest)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    left = {path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name}
    assert left == {
        "config.json",
        "history.json",
        "timings.json",
        "fits.jsonl",
        "model.weights.h5",
        "train",
        "validation",
        "time",
        "checkpoints",
        ".lock",
    }
