"""Students that learn from a teacher's outputs, and from the network's own on other images."""

import keras
import numpy as np
import tensorflow as tf

import looplab
from published.system import BATCH, Conv2D, Dense, System, batches, images, labels

L = keras.layers
SIZE, CLASSES, STEPS = 8, 3, 30


def classifier(width, name):
    layers = [Conv2D(width, 3, strides=2), L.BatchNormalization(), L.ReLU(), L.Flatten(), Dense(CLASSES)]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), *layers], name=name)


def networks():
    student, teacher = classifier(2, "student"), classifier(4, "teacher")
    teacher.trainable = False
    return student, teacher


def digits():
    return batches((images(SIZE, SIZE, 1), labels(CLASSES)))


class Distiller(keras.Model):
    """Knowledge distillation: Keras's own step, with an own `compute_loss` that calls the teacher."""

    def __init__(self, student, teacher):
        super().__init__()
        self.teacher = teacher
        self.student = student

    def compile(self, optimizer, metrics, student_loss_fn, distillation_loss_fn, alpha=0.1, temperature=3):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = distillation_loss_fn
        self.alpha = alpha
        self.temperature = temperature

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
        teacher_pred = tf.nn.softmax(self.teacher(x, training=False) / self.temperature, axis=1)
        distillation_loss = self.distillation_loss_fn(teacher_pred, tf.nn.softmax(y_pred / self.temperature, axis=1))
        student_loss = self.student_loss_fn(y, y_pred)
        return self.alpha * student_loss + (1 - self.alpha) * distillation_loss * self.temperature**2

    def call(self, x, training=None):
        return self.student(x, training=training)


def distiller():
    model = Distiller(*networks())
    model.compile(
        optimizer=keras.optimizers.Adam(),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        student_loss_fn=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss_fn=keras.losses.KLDivergence(),
    )
    return model


class DistillerTrainer(looplab.Trainer):
    def __init__(self, student, teacher, alpha=0.1, temperature=3, **options):
        super().__init__(**options)
        self.teacher = teacher
        self.student = student
        self.student_loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.distillation_loss_fn = keras.losses.KLDivergence()
        self.alpha = alpha
        self.temperature = temperature

    compute_loss = Distiller.compute_loss
    call = Distiller.call


def distiller_trainer(**options):
    metrics = [keras.metrics.SparseCategoricalAccuracy()]
    return DistillerTrainer(*networks(), optimizer=keras.optimizers.Adam(), metrics=metrics, **options)


class SelfTrainer(keras.Model):
    """Consistency training: clean images for the teacher, noisy ones for the student; `compiled_metrics`."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher

    def compile(self, optimizer, metrics, student_loss_fn, distillation_loss_fn, temperature=3):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = distillation_loss_fn
        self.temperature = temperature

    def train_step(self, data):
        (images_clean, _), (images_noisy, y_noisy) = data
        teacher_pred = self.teacher(images_clean, training=False)
        with tf.GradientTape() as tape:
            clean, noisy = self.student(images_clean, training=True), self.student(images_noisy, training=True)
            student_loss = self.student_loss_fn(y_noisy, noisy)
            distillation_loss = self.distillation_loss_fn(
                tf.nn.softmax(teacher_pred / self.temperature, axis=1),
                tf.nn.softmax(clean / self.temperature, axis=1),
            )
            total_loss = (student_loss + distillation_loss) / 2
        variables = self.student.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(total_loss, variables), variables, strict=True))
        return {**self.results(y_noisy, noisy), "distillation_loss": distillation_loss, "total_loss": total_loss}

    def test_step(self, data):
        x, y = data
        return self.results(y, self.student(x, training=False))

    def results(self, y, logits):
        """The compiled metrics, without Keras's `loss`, which this step does not update."""
        self.compiled_metrics.update_state(y, tf.nn.softmax(logits, axis=1))
        return {name: value for name, value in self.get_metrics_result().items() if name != "loss"}


def consistency():
    model = SelfTrainer(*networks())
    model.compile(
        optimizer=keras.optimizers.Adam(),
        metrics=["accuracy"],
        student_loss_fn=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss_fn=keras.losses.KLDivergence(),
        temperature=10,
    )
    return model


class SelfTrainerTrainer(looplab.Trainer):
    def __init__(self, student, teacher, temperature=10, **options):
        super().__init__(**options)
        self.student = student
        self.teacher = teacher
        self.student_loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.distillation_loss_fn = keras.losses.KLDivergence()
        self.temperature = temperature

    results = SelfTrainer.results
    train_step = SelfTrainer.train_step
    test_step = SelfTrainer.test_step


def consistency_trainer(**options):
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    return SelfTrainerTrainer(*networks(), optimizer=keras.optimizers.Adam(), metrics=metrics, **options)


def clean_and_noisy():
    classes = labels(CLASSES)
    return batches(((images(SIZE, SIZE, 1), classes), (images(SIZE, SIZE, 1, seed=2), classes)))


class AdaMatch(keras.Model):
    """AdaMatch: two domains with batches of two sizes, three inner parts of a batch, and a step count in a variable."""

    def __init__(self, model, total_steps, tau=0.9):
        super().__init__()
        self.model = model
        self.tau = tau
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.total_steps = total_steps
        self.current_step = tf.Variable(0, dtype="int64", trainable=False)

    @property
    def metrics(self):
        return [self.loss_tracker]

    def compute_mu(self):
        step = tf.cast(self.current_step, "float32")
        return 0.5 - tf.cos(tf.minimum(np.pi, 2 * np.pi * step / self.total_steps)) / 2

    def train_step(self, data):
        source, target = data
        (source_weak, source_labels), (source_strong, _) = source
        (target_weak, _), (target_strong, _) = target
        of_source, of_target = tf.shape(source_weak)[0], tf.shape(target_weak)[0]
        everything = tf.concat([source_weak, source_strong, target_weak, target_strong], axis=0)
        cross_entropy = keras.losses.CategoricalCrossentropy(from_logits=True)

        with tf.GradientTape() as tape:
            logits = self.model(everything, training=True)
            inferred = self.model(tf.concat([source_weak, source_strong], axis=0), training=False)
            share = keras.random.uniform((2 * of_source, CLASSES))
            source_logits = share * logits[: 2 * of_source] + (1 - share) * inferred
            target_logits = logits[2 * of_source :]

            source_weak_probabilities = tf.nn.softmax(source_logits[:of_source])
            target_weak_probabilities = tf.nn.softmax(target_logits[:of_target])
            ratio = tf.reduce_mean(source_weak_probabilities) / tf.reduce_mean(target_weak_probabilities)
            pseudo_labels = tf.math.l2_normalize(target_weak_probabilities * ratio, axis=1)
            threshold = self.tau * tf.reduce_mean(tf.reduce_max(source_weak_probabilities, axis=-1))
            mask = tf.cast(tf.reduce_max(pseudo_labels, axis=-1) >= threshold, "float32")

            source_loss = cross_entropy(source_labels, source_logits[:of_source])
            source_loss += cross_entropy(source_labels, source_logits[of_source:])
            pseudo_labels, strong = tf.stop_gradient(pseudo_labels), target_logits[of_target:]
            target_loss = keras.losses.categorical_crossentropy(pseudo_labels, strong, from_logits=True)
            loss = source_loss + self.compute_mu() * tf.reduce_mean(mask * target_loss)
            self.current_step.assign_add(1)
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def adamatch():
    model = AdaMatch(classifier(4, "wide_resnet"), STEPS)
    model.compile(optimizer=keras.optimizers.Adam(0.03))
    return model


class AdaMatchTrainer(looplab.Trainer):
    def __init__(self, model, total_steps, tau=0.9, **options):
        super().__init__(model, **options)
        self.tau = tau
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.total_steps = total_steps
        self.current_step = tf.Variable(0, dtype="int64", trainable=False)

    metrics = AdaMatch.metrics
    compute_mu = AdaMatch.compute_mu
    train_step = AdaMatch.train_step


def adamatch_trainer(**options):
    return AdaMatchTrainer(classifier(4, "wide_resnet"), STEPS, optimizer=keras.optimizers.Adam(0.03), **options)


def two_domains():
    classes = tf.one_hot(labels(CLASSES), CLASSES)
    weak, strong = ((images(SIZE, SIZE, 1, seed=seed), classes) for seed in (2, 3))
    target = tf.data.Dataset.from_tensor_slices((weak, strong)).repeat(3).batch(3 * BATCH)
    return tf.data.Dataset.zip(batches((weak, strong)), target)


PAGE = "https://keras.io/examples/vision/"

SYSTEMS = [
    System("distillation", PAGE + "knowledge_distillation/", distiller, distiller_trainer, digits, validation=digits),
    System(
        "consistency_training",
        PAGE + "consistency_training/",
        consistency,
        consistency_trainer,
        clean_and_noisy,
        validation=digits,
        means=("distillation_loss", "total_loss"),
    ),
    System("adamatch", PAGE + "adamatch/", adamatch, adamatch_trainer, two_domains),
]
