"""Adversarial networks that translate images: four optimizers and a persistent tape, or a frozen discriminator."""

import keras
import tensorflow as tf

import looplab
from published.system import Conv2D, Dense, System, batches, images, labels

L = keras.layers
SIZE, CLASSES, LATENT = 8, 3, 4


def translator(name):
    layers = [Conv2D(2, 3, padding="same", activation="relu"), Conv2D(1, 3, padding="same", activation="tanh")]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), *layers], name=name)


def patch_critic(name):
    layers = [keras.Input((SIZE, SIZE, 1)), Conv2D(1, 4, strides=2, padding="same"), L.LeakyReLU(0.2)]
    return keras.Sequential(layers, name=name)


class CycleGAN(keras.Model):
    """CycleGAN: one persistent tape for four networks and four optimizers; `call` returns all outputs."""

    def __init__(self, generator_g, generator_f, discriminator_x, discriminator_y, lambda_cycle=10.0):
        super().__init__()
        self.gen_g = generator_g
        self.gen_f = generator_f
        self.disc_x = discriminator_x
        self.disc_y = discriminator_y
        self.lambda_cycle = lambda_cycle
        self.lambda_identity = 0.5

    def call(self, inputs):
        return self.disc_x(inputs), self.disc_y(inputs), self.gen_g(inputs), self.gen_f(inputs)

    def compile(self, gen_g_optimizer, gen_f_optimizer, disc_x_optimizer, disc_y_optimizer):
        super().compile()
        self.gen_g_optimizer = gen_g_optimizer
        self.gen_f_optimizer = gen_f_optimizer
        self.disc_x_optimizer = disc_x_optimizer
        self.disc_y_optimizer = disc_y_optimizer
        self.adversarial_loss = keras.losses.MeanSquaredError()
        self.cycle_loss = keras.losses.MeanAbsoluteError()

    def generator_loss(self, fake):
        return self.adversarial_loss(tf.ones_like(fake), fake)

    def discriminator_loss(self, real, fake):
        real_loss = self.adversarial_loss(tf.ones_like(real), real)
        return 0.5 * (real_loss + self.adversarial_loss(tf.zeros_like(fake), fake))

    def train_step(self, batch_data):
        real_x, real_y = batch_data
        with tf.GradientTape(persistent=True) as tape:
            fake_y = self.gen_g(real_x, training=True)
            fake_x = self.gen_f(real_y, training=True)
            cycled_x = self.gen_f(fake_y, training=True)
            cycled_y = self.gen_g(fake_x, training=True)
            same_x = self.gen_f(real_x, training=True)
            same_y = self.gen_g(real_y, training=True)

            disc_real_x = self.disc_x(real_x, training=True)
            disc_fake_x = self.disc_x(fake_x, training=True)
            disc_real_y = self.disc_y(real_y, training=True)
            disc_fake_y = self.disc_y(fake_y, training=True)

            weight = self.lambda_cycle * self.lambda_identity
            g_loss = self.generator_loss(disc_fake_y) + self.cycle_loss(real_y, cycled_y) * self.lambda_cycle
            g_loss += self.cycle_loss(real_y, same_y) * weight
            f_loss = self.generator_loss(disc_fake_x) + self.cycle_loss(real_x, cycled_x) * self.lambda_cycle
            f_loss += self.cycle_loss(real_x, same_x) * weight
            disc_x_loss = self.discriminator_loss(disc_real_x, disc_fake_x)
            disc_y_loss = self.discriminator_loss(disc_real_y, disc_fake_y)

        g_gradients = tape.gradient(g_loss, self.gen_g.trainable_variables)
        f_gradients = tape.gradient(f_loss, self.gen_f.trainable_variables)
        disc_x_gradients = tape.gradient(disc_x_loss, self.disc_x.trainable_variables)
        disc_y_gradients = tape.gradient(disc_y_loss, self.disc_y.trainable_variables)
        self.gen_g_optimizer.apply(g_gradients, self.gen_g.trainable_variables)
        self.gen_f_optimizer.apply(f_gradients, self.gen_f.trainable_variables)
        self.disc_x_optimizer.apply(disc_x_gradients, self.disc_x.trainable_variables)
        self.disc_y_optimizer.apply(disc_y_gradients, self.disc_y.trainable_variables)
        return {"G_loss": g_loss, "F_loss": f_loss, "D_X_loss": disc_x_loss, "D_Y_loss": disc_y_loss}


def cyclegan_networks():
    return translator("g"), translator("f"), patch_critic("x"), patch_critic("y")


def cyclegan_optimizers():
    return [keras.optimizers.Adam(2e-4, beta_1=0.5) for _ in range(4)]


def cyclegan():
    model = CycleGAN(*cyclegan_networks())
    model.compile(*cyclegan_optimizers())
    return model


class CycleGANTrainer(looplab.Trainer):
    def __init__(self, generator_g, generator_f, discriminator_x, discriminator_y, lambda_cycle=10.0, **options):
        super().__init__(**options)
        self.gen_g = generator_g
        self.gen_f = generator_f
        self.disc_x = discriminator_x
        self.disc_y = discriminator_y
        self.lambda_cycle = lambda_cycle
        self.lambda_identity = 0.5
        optimizers = cyclegan_optimizers()
        self.gen_g_optimizer, self.gen_f_optimizer, self.disc_x_optimizer, self.disc_y_optimizer = optimizers
        self.adversarial_loss = keras.losses.MeanSquaredError()
        self.cycle_loss = keras.losses.MeanAbsoluteError()

    generator_loss = CycleGAN.generator_loss
    discriminator_loss = CycleGAN.discriminator_loss
    train_step = CycleGAN.train_step


def cyclegan_trainer(**options):
    return CycleGANTrainer(*cyclegan_networks(), **options)


def pairs():
    return batches((images(SIZE, SIZE, 1), images(SIZE, SIZE, 1, seed=1)))


class Sampler(L.Layer):
    """Draws a latent vector from its mean and log variance."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, variance = inputs
        return mean + tf.exp(0.5 * variance) * keras.random.normal(tf.shape(mean), seed=self.seed_generator)


def image_encoder():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = L.Flatten()(inputs)
    return keras.Model(inputs, [Dense(LATENT)(x), Dense(LATENT)(x)], name="encoder")


def mask_generator():
    latent, mask = keras.Input((LATENT,)), keras.Input((SIZE, SIZE, CLASSES))
    x = L.Reshape((SIZE, SIZE, 1))(Dense(SIZE * SIZE)(latent))
    x = L.BatchNormalization(center=False, scale=False)(x)
    x = x * (1 + Conv2D(1, 3, padding="same")(mask)) + Conv2D(1, 3, padding="same")(mask)
    return keras.Model([latent, mask], L.Activation("tanh")(x), name="generator")


def feature_critic():
    mask, image = keras.Input((SIZE, SIZE, CLASSES)), keras.Input((SIZE, SIZE, 1))
    features = L.LeakyReLU(0.2)(Conv2D(4, 4, strides=2, padding="same")(L.Concatenate()([mask, image])))
    return keras.Model([mask, image], [features, Conv2D(1, 2)(features)], name="discriminator")


class GauGAN(keras.Model):
    """GauGAN: hinge, feature and KL losses; the step freezes and unfreezes the discriminator."""

    def __init__(self, encoder, generator, discriminator, feature_loss_coeff=10.0, kl_divergence_loss_coeff=0.1):
        super().__init__()
        self.encoder = encoder
        self.generator = generator
        self.discriminator = discriminator
        self.sampler = Sampler()
        self.feature_loss_coeff = feature_loss_coeff
        self.kl_divergence_loss_coeff = kl_divergence_loss_coeff
        self.disc_loss_tracker = keras.metrics.Mean(name="disc_loss")
        self.gen_loss_tracker = keras.metrics.Mean(name="gen_loss")
        self.feat_loss_tracker = keras.metrics.Mean(name="feat_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.disc_loss_tracker, self.gen_loss_tracker, self.feat_loss_tracker, self.kl_loss_tracker]

    def compile(self, gen_lr=1e-4, disc_lr=4e-4, **kwargs):
        super().compile(**kwargs)
        self.generator_optimizer = keras.optimizers.Adam(gen_lr, beta_1=0.0, beta_2=0.999)
        self.discriminator_optimizer = keras.optimizers.Adam(disc_lr, beta_1=0.0, beta_2=0.999)
        self.discriminator_loss = keras.losses.Hinge()
        self.feature_matching_loss = keras.losses.MeanAbsoluteError()

    def losses_of_generator(self, latent, mask, image, mean, variance):
        real_features = self.discriminator([mask, image])
        fake_features = self.discriminator([mask, self.generator([latent, mask])])
        g_loss = -tf.reduce_mean(fake_features[-1])
        kl_loss = -0.5 * tf.reduce_sum(1 + variance - mean**2 - tf.exp(variance))
        pairs = zip(real_features[:-1], fake_features[:-1], strict=True)
        feature_loss = sum(self.feature_matching_loss(real, fake) for real, fake in pairs)
        return g_loss, self.feature_loss_coeff * feature_loss, self.kl_divergence_loss_coeff * kl_loss

    def loss_of_discriminator(self, latent, mask, image):
        fake = self.discriminator([mask, self.generator([latent, mask])])[-1]
        real = self.discriminator([mask, image])[-1]
        return 0.5 * (
            self.discriminator_loss(-tf.ones_like(fake), fake) + self.discriminator_loss(tf.ones_like(real), real)
        )

    def update_trackers(self, d_loss, g_loss, feature_loss, kl_loss):
        self.disc_loss_tracker.update_state(d_loss)
        self.gen_loss_tracker.update_state(g_loss + feature_loss + kl_loss)
        self.feat_loss_tracker.update_state(feature_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        image, mask = data
        mean, variance = self.encoder(image)
        latent = self.sampler([mean, variance])

        self.discriminator.trainable = True
        with tf.GradientTape() as tape:
            d_loss = self.loss_of_discriminator(latent, mask, image)
        gradients = tape.gradient(d_loss, self.discriminator.trainable_variables)
        self.discriminator_optimizer.apply_gradients(
            zip(gradients, self.discriminator.trainable_variables, strict=True)
        )

        self.discriminator.trainable = False
        with tf.GradientTape() as tape:
            mean, variance = self.encoder(image)
            latent = self.sampler([mean, variance])
            losses = self.losses_of_generator(latent, mask, image, mean, variance)
            total_loss = sum(losses)
        variables = self.generator.trainable_variables + self.encoder.trainable_variables
        gradients = tape.gradient(total_loss, variables)
        self.generator_optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self.update_trackers(d_loss, *losses)

    def test_step(self, data):
        image, mask = data
        mean, variance = self.encoder(image)
        latent = self.sampler([mean, variance])
        losses = self.losses_of_generator(latent, mask, image, mean, variance)
        return self.update_trackers(self.loss_of_discriminator(latent, mask, image), *losses)


def gaugan():
    model = GauGAN(image_encoder(), mask_generator(), feature_critic())
    model.compile()
    return model


class GauGANTrainer(looplab.Trainer):
    def __init__(self, encoder, generator, discriminator, **options):
        super().__init__(**options)
        self.encoder = encoder
        self.generator = generator
        self.discriminator = discriminator
        self.sampler = Sampler()
        self.feature_loss_coeff = 10.0
        self.kl_divergence_loss_coeff = 0.1
        self.disc_loss_tracker = keras.metrics.Mean(name="disc_loss")
        self.gen_loss_tracker = keras.metrics.Mean(name="gen_loss")
        self.feat_loss_tracker = keras.metrics.Mean(name="feat_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")
        self.generator_optimizer = keras.optimizers.Adam(1e-4, beta_1=0.0, beta_2=0.999)
        self.discriminator_optimizer = keras.optimizers.Adam(4e-4, beta_1=0.0, beta_2=0.999)
        self.discriminator_loss = keras.losses.Hinge()
        self.feature_matching_loss = keras.losses.MeanAbsoluteError()

    metrics = GauGAN.metrics
    losses_of_generator = GauGAN.losses_of_generator
    loss_of_discriminator = GauGAN.loss_of_discriminator
    update_trackers = GauGAN.update_trackers
    train_step = GauGAN.train_step
    test_step = GauGAN.test_step


def gaugan_trainer(**options):
    return GauGANTrainer(image_encoder(), mask_generator(), feature_critic(), **options)


def masked_images():
    return batches((images(SIZE, SIZE, 1), tf.one_hot(labels(CLASSES, SIZE, SIZE), CLASSES)))


PAGE = "https://keras.io/examples/generative/"
LOSSES = ("G_loss", "F_loss", "D_X_loss", "D_Y_loss")

SYSTEMS = [
    System("cyclegan", PAGE + "cyclegan/", cyclegan, cyclegan_trainer, pairs, means=LOSSES),
    System("gaugan", PAGE + "gaugan/", gaugan, gaugan_trainer, masked_images, validation=masked_images),
]
