"""Two loops of reinforcement learning with single steps learn: REINFORCE and DQN."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

L = keras.layers
LENGTH = 7


class Corridor:
    """Places in a row. A walk starts in the middle, and ends at the left (reward 0), the right (1) or after 30 steps.

    Each step costs 0.02: a random walk returns about 0.3, and the shortest one to the right 0.94.
    """

    most_steps = 30

    def reset(self):
        self.place, self.steps = LENGTH // 2, 0
        return self.seen

    @property
    def seen(self):
        return np.eye(LENGTH, dtype="float32")[self.place]

    def step(self, action):
        """Action 1 is to the right; returns what is seen, the reward, and whether the walk is over."""
        self.place += 1 if action else -1
        self.steps += 1
        ends = {0: 0.0, LENGTH - 1: 1.0}
        over = self.place in ends or self.steps == self.most_steps
        return self.seen, ends.get(self.place, 0.0) - 0.02, over


def together(steps):
    """The parts of all steps, by name."""
    names = "places", "actions", "rewards", "following", "over"
    return {name: np.array(part) for name, part in zip(names, zip(*steps, strict=True), strict=True)}


def walk(choose):
    """The steps of one walk with a policy, each with the parts that `together` names."""
    corridor, steps, over = Corridor(), [], False
    seen = corridor.reset()
    while not over:
        action = choose(seen)
        following, reward, over = corridor.step(action)
        steps.append((seen, action, reward, following, over))
        seen = following
    return steps


def average_return(choose, walks=50):
    return np.mean([sum(step[2] for step in walk(choose)) for _ in range(walks)])


@pytest.fixture
def random():
    keras.utils.set_random_seed(0)
    return np.random.default_rng(0)


@pytest.fixture
def return_of_chance(random):
    found = average_return(lambda seen: random.integers(2), walks=500)
    assert 0.2 < found < 0.4
    return found


def test_reinforce_learns(random, return_of_chance, tmp_path):
    """Each walk is one batch: the log probability of its actions is weighted by the return that followed them."""
    policy = keras.Sequential([keras.Input((LENGTH,)), L.Dense(16, "tanh"), L.Dense(2, "softmax")])
    policy.compile(optimizer=keras.optimizers.Adam(0.02), loss="sparse_categorical_crossentropy")
    trainer = looplab.Trainer(policy, log_dir=tmp_path, checkpoint=looplab.Checkpoint(every=50))
    baseline = 0.0
    for _ in range(150):
        steps = together(walk(lambda seen: random.choice(2, p=trainer.predict_on_batch(seen[None])[0])))
        returns = np.cumsum(steps["rewards"][::-1])[::-1]
        trainer.train_on_batch(steps["places"], steps["actions"], sample_weight=returns - baseline)
        baseline += 0.1 * (returns[0] - baseline)
    learned = average_return(lambda seen: trainer.predict_on_batch(seen[None])[0].argmax(), walks=1)
    print(f"REINFORCE: {learned:.3f}, random: {return_of_chance:.3f}")
    assert learned > return_of_chance + 0.4
    assert len(looplab.read_scalars(tmp_path / "train")["batch_loss"][0]) == trainer.steps == 150


class DQN(looplab.Trainer):
    """Learns the value of each action, from targets that a slower copy of the network computes."""

    def __init__(self, values, **options):
        super().__init__(values, **options)
        self.target = keras.models.clone_model(values)
        self.target.set_weights(values.get_weights())

    def train_step(self, batch):
        best = tf.reduce_max(self.target(batch["following"]), axis=1)
        targets = batch["rewards"] + 0.95 * tf.where(batch["over"], 0.0, best)
        with tf.GradientTape() as tape:
            of_actions = tf.reduce_sum(self(batch["places"], training=True) * tf.one_hot(batch["actions"], 2), axis=1)
            loss = tf.reduce_mean((targets - of_actions) ** 2)
        self.minimize(tape, loss, self.model.trainable_variables)
        for slow, fast in zip(self.target.weights, self.model.weights, strict=True):
            slow.assign(0.95 * slow + 0.05 * fast)
        return {"loss": loss}


def test_dqn_learns(random, return_of_chance):
    """Batches are drawn from the steps of earlier walks, so that their sizes grow at first."""
    values = keras.Sequential([keras.Input((LENGTH,)), L.Dense(16, "tanh"), L.Dense(2)])
    trainer = DQN(values, optimizer=keras.optimizers.Adam(0.01))
    memory = []
    for number in range(60):
        explores = max(0.1, 1 - number / 30)

        def choose(seen, explores=explores):
            return (
                random.integers(2) if random.random() < explores else trainer.predict_on_batch(seen[None])[0].argmax()
            )

        memory += walk(choose)
        for _ in range(8):
            drawn = [memory[index] for index in random.integers(len(memory), size=min(32, len(memory)))]
            trainer.train_on_batch(together(drawn))
    learned = average_return(lambda seen: trainer.predict_on_batch(seen[None])[0].argmax(), walks=1)
    print(f"DQN: {learned:.3f}, random: {return_of_chance:.3f}")
    assert learned > return_of_chance + 0.4
    assert trainer.steps == 480
