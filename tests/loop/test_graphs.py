"""Traced functions, and what their operations do with variables."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.graphs import Copies, captured, changed_tables, releasable, trace, written, written_variables

SPEC = tf.TensorSpec((None,), tf.float32)


def names(variables):
    return [variable.name for variable in variables]


@pytest.fixture
def variables():
    return [tf.Variable([1.0, 2.0], name=name) for name in ("read", "assigned", "gathered", "in_branch")]


@pytest.fixture
def function(variables):
    read, assigned, gathered, in_branch = variables

    def step(x):
        assigned.assign_add(read)
        tf.cond(x[0] > 0, lambda: in_branch.assign(2 * in_branch), lambda: tf.identity(gathered))
        return x + tf.gather(gathered, [0])

    return trace(step, SPEC)


def test_knows_which_variables_a_function_uses_and_changes(function, variables):
    _, assigned, _, in_branch = variables
    assert {*names(captured(function))} == {*names(variables)}
    assert {*names(written_variables(function))} == {*names([assigned, in_branch])}
    reading = [op for op in function.graph.get_operations() if op.type == "ReadVariableOp"]
    assert reading
    assert written(reading) == set()


def test_copies_change_in_place_of_the_variables(function, variables):
    copies = Copies(function)
    read, assigned, _, in_branch = variables
    assert copies.of(read) is None
    copies.refresh()
    function(tf.ones(1))
    np.testing.assert_array_equal(assigned, [1, 2])
    np.testing.assert_array_equal(copies.of(assigned), [2, 4])
    np.testing.assert_array_equal(copies.of(in_branch), [2, 4])
    read.assign([5.0, 5.0])  # reads are of the variable itself
    copies.refresh()
    function(tf.ones(1))
    np.testing.assert_array_equal(copies.of(assigned), [6, 7])
    assert Copies().pairs == []


def test_variables_that_a_function_creates_exist_at_once():
    created, traces = [], []

    def step(x):
        traces.append(None)
        if not created:
            created.append(tf.Variable(3.0))
        return x * created[0]

    function = trace(step, SPEC)
    assert float(created[0]) == 3
    assert len(traces) == 2  # what is built now may be traced differently
    assert function(tf.ones(1)).numpy().tolist() == [3]

    def failing(x):
        created.append(tf.Variable(4.0))
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        trace(failing, SPEC)
    assert float(created[1]) == 4


def test_finds_tables_that_a_graph_changes():
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)

    def reads(x):
        return table.lookup(tf.as_string(x))

    def inserts(x):
        def insert():
            table.insert(tf.as_string(x), tf.cast(x, tf.int64))

        tf.cond(x[0] > 0, insert, lambda: None)
        return x

    assert changed_tables(trace(reads, SPEC).graph) == []
    assert changed_tables(trace(inserts, SPEC).graph) == ["LookupTableInsertV2"]


def test_gradients_of_custom_functions_are_released_with_their_graph():
    @tf.custom_gradient
    def tripled(x):
        return tf.identity(x), lambda upstream: 3 * upstream

    def slope():
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tripled(x)
            return tape.gradient(y, x)

        return trace(step, SPEC)

    with releasable:
        function = slope()
    assert function(tf.ones(1)).numpy().tolist() == [3]
    graph = weakref.ref(function.graph)
    del function
    gc.collect()
    assert graph() is None
