"""Sequence models: masks of tokens, several updates in a step, and batches that are dicts."""

import keras
import tensorflow as tf

import looplab
from published.system import Conv2D, Dense, System, batches, images, labels, normal

L = keras.layers
SIZE, WIDTH, WORDS, LENGTH, CAPTIONS = 8, 4, 7, 6, 2


class Decoder(L.Layer):
    """One decoder block: it attends to earlier words and to the encoder's output."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.embedding = L.Embedding(WORDS, WIDTH)
        self.query = Dense(WIDTH)
        self.attention = L.Attention(dropout=0.1)
        self.norm = L.LayerNormalization()
        self.out = Dense(WORDS)
        self.dropout = L.Dropout(0.3)

    def call(self, words, encoded, training=None, mask=None):
        x = self.embedding(words)
        x += self.attention([self.query(x), x], mask=[None, mask], use_causal_mask=True, training=training)
        x = self.norm(x + self.attention([x, encoded], training=training))
        return self.out(self.dropout(x, training=training))


def cnn():
    layers = [keras.Input((SIZE, SIZE, 1)), Conv2D(WIDTH, 3, strides=3), L.Reshape((-1, WIDTH))]
    model = keras.Sequential(layers, name="cnn")
    model.trainable = False
    return model


def token_encoder():
    return keras.Sequential([keras.Input((None, WIDTH)), L.LayerNormalization(), Dense(WIDTH, "relu")], name="encoder")


class ImageCaptioning(keras.Model):
    """Image captioning: an update for each caption of an image in one step, and losses that a mask of words weighs."""

    def __init__(self, cnn_model, encoder, decoder, num_captions_per_image=CAPTIONS):
        super().__init__()
        self.cnn_model = cnn_model
        self.encoder = encoder
        self.decoder = decoder
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.acc_tracker = keras.metrics.Mean(name="accuracy")
        self.num_captions_per_image = num_captions_per_image

    def calculate_loss(self, y_true, y_pred, mask):
        mask = tf.cast(mask, "float32")
        return tf.reduce_sum(self.loss(y_true, y_pred) * mask) / tf.reduce_sum(mask)

    def calculate_accuracy(self, y_true, y_pred, mask):
        hits = tf.logical_and(mask, tf.equal(y_true, tf.argmax(y_pred, axis=2, output_type=y_true.dtype)))
        return tf.reduce_sum(tf.cast(hits, "float32")) / tf.reduce_sum(tf.cast(mask, "float32"))

    def caption_loss_and_accuracy(self, img_embed, caption, training):
        encoded = self.encoder(img_embed, training=training)
        given, expected = caption[:, :-1], caption[:, 1:]
        predicted = self.decoder(given, encoded, training=training, mask=tf.not_equal(given, 0))
        mask = tf.not_equal(expected, 0)
        loss = self.calculate_loss(expected, predicted, mask)
        return loss, self.calculate_accuracy(expected, predicted, mask)

    def train_step(self, batch_data):
        images, captions = batch_data
        batch_loss = batch_acc = 0.0
        img_embed = self.cnn_model(images)
        for index in range(self.num_captions_per_image):
            with tf.GradientTape() as tape:
                loss, acc = self.caption_loss_and_accuracy(img_embed, captions[:, index], training=True)
                batch_loss += loss
                batch_acc += acc
            variables = self.encoder.trainable_variables + self.decoder.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.loss_tracker.update_state(batch_loss)
        self.acc_tracker.update_state(batch_acc / self.num_captions_per_image)
        return {"loss": self.loss_tracker.result(), "acc": self.acc_tracker.result()}

    def test_step(self, batch_data):
        images, captions = batch_data
        batch_loss = batch_acc = 0.0
        img_embed = self.cnn_model(images)
        for index in range(self.num_captions_per_image):
            loss, acc = self.caption_loss_and_accuracy(img_embed, captions[:, index], training=False)
            batch_loss += loss
            batch_acc += acc
        self.loss_tracker.update_state(batch_loss)
        self.acc_tracker.update_state(batch_acc / self.num_captions_per_image)
        return {"loss": self.loss_tracker.result(), "acc": self.acc_tracker.result()}

    @property
    def metrics(self):
        return [self.loss_tracker, self.acc_tracker]


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in the first steps, then keeps its value."""

    def __init__(self, learning_rate, warmup_steps):
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        return self.learning_rate * tf.minimum(tf.cast(step, "float32") / self.warmup_steps, 1.0)

    def get_config(self):
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps}


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)


def captioning():
    model = ImageCaptioning(cnn(), token_encoder(), Decoder())
    model.compile(optimizer=keras.optimizers.Adam(WarmUp(1e-3, 15)), loss=cross_entropy())
    return model


class ImageCaptioningTrainer(looplab.Trainer):
    def __init__(self, cnn_model, encoder, decoder, num_captions_per_image=CAPTIONS, **options):
        super().__init__(**options)
        self.cnn_model = cnn_model
        self.encoder = encoder
        self.decoder = decoder
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.acc_tracker = keras.metrics.Mean(name="accuracy")
        self.num_captions_per_image = num_captions_per_image

    metrics = ImageCaptioning.metrics
    calculate_loss = ImageCaptioning.calculate_loss
    calculate_accuracy = ImageCaptioning.calculate_accuracy
    caption_loss_and_accuracy = ImageCaptioning.caption_loss_and_accuracy
    train_step = ImageCaptioning.train_step
    test_step = ImageCaptioning.test_step


def captioning_trainer(**options):
    networks, optimizer = (cnn(), token_encoder(), Decoder()), keras.optimizers.Adam(WarmUp(1e-3, 15))
    return ImageCaptioningTrainer(*networks, optimizer=optimizer, loss=cross_entropy(), **options)


def captioned_images():
    return batches((images(SIZE, SIZE, 1), labels(WORDS, CAPTIONS, LENGTH)))


class Transformer(keras.Model):
    """The speech transformer: batches are dicts, `call` gets a list, and a mask of tokens is the sample weight."""

    def __init__(self, num_classes=WORDS):
        super().__init__()
        self.loss_metric = keras.metrics.Mean(name="loss")
        self.num_classes = num_classes
        self.encoder = token_encoder()
        self.decoder = Decoder()

    def decode(self, encoded, target):
        return self.decoder(target, encoded)

    def call(self, inputs):
        source, target = inputs
        return self.decode(self.encoder(source), target)

    @property
    def metrics(self):
        return [self.loss_metric]

    def train_step(self, batch):
        given, expected = batch["target"][:, :-1], batch["target"][:, 1:]
        with tf.GradientTape() as tape:
            predicted = self([batch["source"], given])
            one_hot = tf.one_hot(expected, depth=self.num_classes)
            mask = tf.math.logical_not(tf.math.equal(expected, 0))
            loss = self.compute_loss(None, one_hot, predicted, sample_weight=mask)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.loss_metric.update_state(loss)
        return {"loss": self.loss_metric.result()}

    def test_step(self, batch):
        given, expected = batch["target"][:, :-1], batch["target"][:, 1:]
        predicted = self([batch["source"], given])
        one_hot = tf.one_hot(expected, depth=self.num_classes)
        mask = tf.math.logical_not(tf.math.equal(expected, 0))
        self.loss_metric.update_state(self.compute_loss(None, one_hot, predicted, sample_weight=mask))
        return {"loss": self.loss_metric.result()}


def smooth_loss():
    return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)


def transformer():
    model = Transformer()
    model.compile(optimizer=keras.optimizers.Adam(WarmUp(1e-3, 15)), loss=smooth_loss())
    return model


class TransformerTrainer(looplab.Trainer):
    def __init__(self, num_classes=WORDS, **options):
        super().__init__(**options)
        self.loss_metric = keras.metrics.Mean(name="loss")
        self.num_classes = num_classes
        self.encoder = token_encoder()
        self.decoder = Decoder()

    decode = Transformer.decode
    call = Transformer.call
    metrics = Transformer.metrics
    train_step = Transformer.train_step
    test_step = Transformer.test_step


def transformer_trainer(**options):
    optimizer = keras.optimizers.Adam(WarmUp(1e-3, 15))
    return TransformerTrainer(optimizer=optimizer, loss=smooth_loss(), **options)


def recordings():
    return batches({"source": normal(5, WIDTH), "target": labels(WORDS, LENGTH)})


SYSTEMS = [
    System(
        "image_captioning",
        "https://keras.io/examples/vision/image_captioning/",
        captioning,
        captioning_trainer,
        captioned_images,
        validation=captioned_images,
    ),
    System(
        "speech_transformer",
        "https://keras.io/examples/audio/transformer_asr/",
        transformer,
        transformer_trainer,
        recordings,
        validation=recordings,
    ),
]
