"""The ledger, alone."""

import keras
import pytest
import tensorflow as tf

from looplab.loop.losses import Ledger


class Penalty(keras.layers.Layer):
    def call(self, x):
        self.add_loss(x)
        return x


def numbers(parts):
    return {name: float(value) for name, value in parts.items()}


def regularized():
    """A variable with value 3 and a penalty of 0.5 * 3²."""
    layer = keras.layers.Dense(
        1, use_bias=False, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.5)
    )
    layer.build((None, 1))
    layer.kernel.assign([[3.0]])
    return layer.kernel


def test_each_part_has_a_name_and_is_summed():
    ledger = Ledger()
    ledger.add("kl", tf.constant([1.0, 2.0]))
    ledger.add("kl", tf.constant(4.0))
    ledger.add("kl", tf.constant(5.0))
    ledger.add("mse", tf.constant(6))
    assert numbers(ledger.parts([])) == {"kl": 3, "kl_2": 4, "kl_3": 5, "mse": 6}


def test_records_what_a_layer_keeps_of_its_losses():
    ledger, layer = Ledger(), Penalty(name="penalty")
    layer(tf.constant([1.0, 2.0]))
    ledger.record(layer, layer.losses[0])
    ledger.record(layer, tf.constant(7.0))  # Keras has dropped it
    assert numbers(ledger.parts([])) == {"penalty": 3}


def test_no_loss_leaves_an_inner_graph():
    ledger, layer = Ledger(), Penalty(name="penalty")

    @tf.function
    def inner(x):
        layer(x)
        ledger.record(layer, layer.losses[0])

    with pytest.raises(ValueError, match="Layer 'penalty' calls `add_loss` inside"):
        inner(tf.constant(1.0))


def test_takes_each_part_once():
    ledger = Ledger()
    ledger.add("a", 1.0)
    assert [float(value) for value in ledger.take()] == [1]
    ledger.add("b", 2.0)
    assert [float(value) for value in ledger.take([regularized()])] == [2, 4.5]
    assert ledger.take([regularized()]) == []


def test_regularization_is_one_part_of_the_weights_before_the_step_changes_them():
    kernel = regularized()
    asked, not_asked = Ledger(), Ledger()
    for ledger in (asked, not_asked):
        ledger.start([kernel])
    assert numbers(asked.parts([kernel])) == numbers(asked.parts([kernel])) == {"regularization": 4.5}
    kernel.assign([[1.0]])
    assert numbers(asked.all()) == numbers(not_asked.all()) == {"regularization": 4.5}
    assert not_asked.parts([]) == {}
