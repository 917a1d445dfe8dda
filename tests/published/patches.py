"""Systems with unusual updates: masked patches with nested lists of variables, and layers that train themselves."""

import keras
import tensorflow as tf

import looplab
from published.system import Dense, System, batches, images, labels

L = keras.layers
SIZE, PATCH, WIDTH, MASKED, CLASSES = 8, 4, 4, 3, 3
PATCHES = (SIZE // PATCH) ** 2


class Patches(L.Layer):
    """Cuts images into flat patches."""

    def call(self, images):
        patches = tf.image.extract_patches(images, [1, PATCH, PATCH, 1], [1, PATCH, PATCH, 1], [1] * 4, "VALID")
        return tf.reshape(patches, (-1, PATCHES, PATCH * PATCH))


class PatchEncoder(L.Layer):
    """Embeds the patches that a random mask leaves; a learned token replaces the others."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mask_token = self.add_weight(shape=(1, PATCH * PATCH), initializer="random_normal", name="mask_token")
        self.projection = Dense(WIDTH)
        self.position_embedding = L.Embedding(PATCHES, WIDTH)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, patches):
        count = tf.shape(patches)[0]
        positions = tf.tile(self.position_embedding(tf.range(PATCHES))[None], (count, 1, 1))
        embeddings = self.projection(patches) + positions
        order = tf.argsort(keras.random.uniform((count, PATCHES), seed=self.seed_generator), axis=-1)
        masked, unmasked = order[:, :MASKED], order[:, MASKED:]
        unmasked_embeddings = tf.gather(embeddings, unmasked, axis=1, batch_dims=1)
        unmasked_positions = tf.gather(positions, unmasked, axis=1, batch_dims=1)
        masked_positions = tf.gather(positions, masked, axis=1, batch_dims=1)
        tokens = tf.tile(self.projection(tf.convert_to_tensor(self.mask_token))[None], (count, MASKED, 1))
        return unmasked_embeddings, tokens + masked_positions, unmasked_positions, masked


def patch_networks():
    augmentation = keras.Sequential([keras.Input((SIZE, SIZE, 1)), L.RandomFlip("horizontal")], name="augmentation")
    encoder = keras.Sequential([keras.Input((None, WIDTH)), L.LayerNormalization(), Dense(WIDTH)], name="encoder")
    layers = [L.Flatten(), Dense(SIZE * SIZE, "sigmoid"), L.Reshape((SIZE, SIZE, 1))]
    decoder = keras.Sequential([keras.Input((PATCHES, WIDTH)), *layers], name="decoder")
    return augmentation, Patches(), PatchEncoder(), encoder, decoder


class MaskedAutoencoder(keras.Model):
    """The masked auto-encoder: gradients for a list of lists of variables; the loss and the metrics are compiled."""

    def __init__(self, augmentation, patch_layer, patch_encoder, encoder, decoder):
        super().__init__()
        self.augmentation = augmentation
        self.patch_layer = patch_layer
        self.patch_encoder = patch_encoder
        self.encoder = encoder
        self.decoder = decoder

    def calculate_loss(self, images, test=False):
        patches = self.patch_layer(self.augmentation(images, training=not test))
        unmasked, masked, positions, mask_indices = self.patch_encoder(patches)
        encoded = self.encoder(unmasked) + positions
        decoded = self.patch_layer(self.decoder(tf.concat([encoded, masked], axis=1)))
        loss_patch = tf.gather(patches, mask_indices, axis=1, batch_dims=1)
        loss_output = tf.gather(decoded, mask_indices, axis=1, batch_dims=1)
        return self.compute_loss(y=loss_patch, y_pred=loss_output), loss_patch, loss_output

    def train_step(self, images):
        with tf.GradientTape() as tape:
            total_loss, loss_patch, loss_output = self.calculate_loss(images)
        parts = self.augmentation, self.patch_layer, self.patch_encoder, self.encoder, self.decoder
        variables = [part.trainable_variables for part in parts]
        gradients = tape.gradient(total_loss, variables)
        pairs = [pair for part in zip(gradients, variables, strict=True) for pair in zip(*part, strict=True)]
        self.optimizer.apply_gradients(pairs)
        return {**self.compute_metrics(images, loss_patch, loss_output), "loss": total_loss}

    def test_step(self, images):
        total_loss, loss_patch, loss_output = self.calculate_loss(images, test=True)
        return {**self.compute_metrics(images, loss_patch, loss_output), "loss": total_loss}


def masked_autoencoder():
    model = MaskedAutoencoder(*patch_networks())
    optimizer = keras.optimizers.AdamW(learning_rate=5e-3, weight_decay=1e-4)
    model.compile(optimizer=optimizer, loss=keras.losses.MeanSquaredError(), metrics=["mae"])
    return model


class MaskedAutoencoderTrainer(looplab.Trainer):
    def __init__(self, augmentation, patch_layer, patch_encoder, encoder, decoder, **options):
        super().__init__(**options)
        self.augmentation = augmentation
        self.patch_layer = patch_layer
        self.patch_encoder = patch_encoder
        self.encoder = encoder
        self.decoder = decoder

    calculate_loss = MaskedAutoencoder.calculate_loss
    train_step = MaskedAutoencoder.train_step
    test_step = MaskedAutoencoder.test_step


def masked_autoencoder_trainer(**options):
    optimizer = keras.optimizers.AdamW(learning_rate=5e-3, weight_decay=1e-4)
    compiled = {"optimizer": optimizer, "loss": keras.losses.MeanSquaredError(), "metrics": ["mae"]}
    return MaskedAutoencoderTrainer(*patch_networks(), **compiled, **options)


def pictures():
    return batches(images(SIZE, SIZE, 1))


class FFDense(L.Layer):
    """A dense layer that trains itself, by the optimizer that it owns."""

    def __init__(self, units, optimizer, loss_metric, num_epochs=2, **kwargs):
        super().__init__(**kwargs)
        self.dense = Dense(units)
        self.optimizer = optimizer
        self.loss_metric = loss_metric
        self.threshold = 1.5
        self.num_epochs = num_epochs

    def call(self, x):
        return tf.nn.relu(self.dense(x / (tf.norm(x, axis=1, keepdims=True) + 1e-4)))

    def forward_forward(self, x_pos, x_neg):
        for _ in range(self.num_epochs):
            with tf.GradientTape() as tape:
                g_pos = tf.reduce_mean(self.call(x_pos) ** 2, axis=1)
                g_neg = tf.reduce_mean(self.call(x_neg) ** 2, axis=1)
                loss = tf.math.softplus(tf.concat([self.threshold - g_pos, g_neg - self.threshold], axis=0))
                mean_loss = tf.reduce_mean(loss)
            self.loss_metric.update_state([mean_loss])
            gradients = tape.gradient(mean_loss, self.dense.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.dense.trainable_weights, strict=True))
        outputs = tf.stop_gradient(self.call(x_pos)), tf.stop_gradient(self.call(x_neg))
        return *outputs, self.loss_metric.result()


def ff_layers():
    widths = (6, 5)
    return [FFDense(width, keras.optimizers.Adam(0.03), keras.metrics.Mean()) for width in widths]


class FFNetwork(keras.Model):
    """The forward-forward algorithm: no common loss, optimizers inside of layers, `tf.function` on the step."""

    def __init__(self, layer_list, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.loss_var = tf.Variable(0.0, trainable=False)
        self.loss_count = tf.Variable(0.0, trainable=False)
        self.layer_list = layer_list

    def overlay(self, x, y):
        return tf.concat([tf.one_hot(y, CLASSES), x[:, CLASSES:]], axis=1)

    @tf.function
    def train_step(self, data):
        x, y = data
        x = tf.reshape(x, [-1, SIZE * SIZE])
        h_pos = self.overlay(x, y)
        h_neg = self.overlay(x, keras.random.shuffle(y, seed=self.seed_generator))
        for layer in self.layer_list:
            h_pos, h_neg, loss = layer.forward_forward(h_pos, h_neg)
            self.loss_var.assign_add(loss)
            self.loss_count.assign_add(1.0)
        return {"FinalLoss": self.loss_var / self.loss_count}


def forward_forward():
    model = FFNetwork(ff_layers())
    model.compile(optimizer="adam")
    return model


class FFNetworkTrainer(looplab.Trainer):
    def __init__(self, layer_list, **options):
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.loss_var = tf.Variable(0.0, trainable=False)
        self.loss_count = tf.Variable(0.0, trainable=False)
        self.layer_list = layer_list

    overlay = FFNetwork.overlay
    train_step = FFNetwork.train_step


def forward_forward_trainer(**options):
    return FFNetworkTrainer(ff_layers(), **options)


def digits():
    return batches((images(SIZE, SIZE), labels(CLASSES)))


PAGE = "https://keras.io/examples/vision/"

SYSTEMS = [
    System(
        "masked_autoencoder",
        PAGE + "masked_image_modeling/",
        masked_autoencoder,
        masked_autoencoder_trainer,
        pictures,
        validation=pictures,
        means=("loss",),
    ),
    System(
        "forward_forward",
        PAGE + "forwardforward/",
        forward_forward,
        forward_forward_trainer,
        digits,
        differing=("FinalLoss",),
        reason="it depends on `metric.result()`, which is the value of the batch alone inside a step of looplab",
    ),
]
