"""Which errors users see in place of those that TensorFlow wraps around them."""

import tensorflow as tf

from looplab import checks
from looplab.loop.errors import raise_own


def caught(function):
    """The error that a user sees of one that is raised while a function is traced."""
    try:
        tf.function(function)()
    except Exception as error:
        try:
            raise_own(error)
        except Exception as own:
            return own
        return error


def test_an_error_of_looplab_is_raised_anew():
    error = caught(lambda: checks.whole(1, "epochs", 0))
    assert type(error) is ValueError
    assert str(error).startswith("`epochs` must be")


def test_an_error_of_a_user_keeps_its_type():
    class MineError(Exception):
        pass

    def fails():
        raise MineError("mine")

    assert type(caught(fails)) is MineError


def test_an_error_that_autograph_cannot_make_is_the_users():
    class PickyError(Exception):
        def __init__(self, one, two):
            super().__init__(one, two)

    def fails():
        raise PickyError(1, 2)

    assert type(caught(fails)) is PickyError
