"""Traces functions, and finds what the operations of a traced graph do with variables."""

from __future__ import annotations

import contextlib
import contextvars
import re
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import deepcopy
from typing import Any

import tensorflow as tf

from looplab.compat import EAGER_VARIABLE, converting_users_code, operation_types, read_only_inputs
from looplab.loop.hooks import Hooks
from looplab.variables import plain

_READING = ("ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape")
_ahead = contextvars.ContextVar("ahead", default=False)
_CHANGING = re.compile("LookupTable(Insert|Remove|Import)|Queue(Enqueue|Dequeue)")


def trace(function: Callable[..., Any], *specs: Any, jit_compile: bool = False) -> Any:
    """The `tf.function` of a function, traced for these signatures.

    Variables that it creates get their values immediately, outside the graph, so none is left without a value if the
    trace fails. Like `tf.function`, this traces once more if any were created outside of `creating_ahead`: objects that
    are not built yet may have been traced differently. The graph is released with the function.
    """
    created: list[tf.Variable] = []

    def create(next_creator: Callable[..., tf.Variable], **options: Any) -> tf.Variable:
        if tf.is_symbolic_tensor(options.get("initial_value")):  # which only the graph can compute
            return next_creator(**options)
        with tf.init_scope():
            variable = next_creator(**{**options, **EAGER_VARIABLE})
        if not _ahead.get():
            created.append(variable)
        return variable

    def creating(*arguments: Any) -> Any:
        with tf.variable_creator_scope(create):
            return function(*arguments)

    def traced() -> Any:
        with releasable:
            return concrete(creating, *specs, jit_compile=jit_compile)

    first = traced()
    return traced() if created else first


def concrete(function: Callable[..., Any], *specs: Any, jit_compile: bool = False) -> Any:
    """The `tf.function` of a function that creates no variables, traced for these signatures.

    AutoGraph takes up to 40 ms for such a function, so it only converts what `converted` marks as a user's.
    """
    with converting_users_code():
        options = {"autograph": False, "jit_compile": jit_compile or None}
        return tf.function(function, **options).get_concrete_function(*specs)


@contextlib.contextmanager
def creating_ahead() -> Iterator[None]:
    """Inside it, a step creates variables before it uses them: the rest is traced as if they had existed."""
    token = _ahead.set(True)
    try:
        yield
    finally:
        _ahead.reset(token)


def _registering(
    register: Callable[..., Any], registration: tf.RegisterGradient, gradient: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers a gradient that the current graph, and not the registry, keeps alive."""
    graph = tf.compat.v1.get_default_graph()
    graph.registered_gradients = [*getattr(graph, "registered_gradients", ()), gradient]
    reference = weakref.ref(gradient)

    def held_by_graph(*arguments: Any) -> Any:
        held = reference()
        assert held is not None  # only the graph's own operations refer to it
        return held(*arguments)

    register(registration, held_by_graph)
    return gradient


releasable = Hooks(tf.RegisterGradient, {"__call__": _registering})
"""Inside it, the gradient of each call of a `tf.custom_gradient` function lives as long as the graph of that call.

TensorFlow registers each such gradient globally, under a name of its own, and never removes it. The gradient holds the
graph, which holds all that was traced with it: 5 to 10 MB for a small model. Every step that applies a Keras optimizer
makes such a call (`ReplicaContext.all_reduce`), and so does every `silu`.
"""


def written(operations: Iterable[tf.Operation]) -> set[int]:
    """The identities of the resource tensors that some of these operations may change."""
    return {
        id(tensor)
        for operation in operations
        for index, tensor in enumerate(operation.inputs)
        if tensor.dtype == tf.resource and index not in _only_read(operation)
    }


def captured(function: Any) -> list[tf.Variable]:
    """All variables that a traced function uses, in the order of their use; with replicas, those of each."""
    parts = (part for variable in function.graph.variables for part in getattr(variable, "values", [variable]))
    by_handle = {id(part.handle): part for part in parts}
    used = (by_handle.get(id(external)) for external, _ in function.graph.captures)
    return [variable for variable in used if variable is not None]


def written_variables(function: Any) -> list[tf.Variable]:
    """Those of them that it may change."""
    changed = written(function.graph.get_operations())
    handles = {id(external) for external, internal in function.graph.captures if id(internal) in changed}
    return [variable for variable in captured(function) if id(variable.handle) in handles]


def changed(variables: Iterable[Any], graph: Any, ignoring: Iterable[list[tf.Operation]] = ()) -> list[Any]:
    """The variables that the operations of a `tf.function` may change, except some of them."""
    inside = written(set(graph.get_operations()).difference(*ignoring))
    outside = {id(external) for external, internal in graph.captures if id(internal) in inside}
    return [variable for variable in variables if id(plain(variable).handle) in outside]


def changed_tables(graph: tf.Graph) -> list[str]:
    """The operations of a graph that change tables or queues, whose state no variable holds."""
    return sorted(filter(_CHANGING.match, operation_types(graph)))


class Copies:
    """Lets a traced function change copies of the variables that it would change, so that it only reads.

    Args:
        function: The traced function; None for none, which has no copies.
    """

    def __init__(self, function: Any = None):
        self.lock = threading.RLock()
        """Held while the function is called, because all threads share the copies."""
        self.pairs: list[tuple[tf.Variable, tf.Variable]] = []
        """Each variable, and its copy."""
        for variable in [] if function is None else written_variables(function):
            with tf.device(variable.device):
                # In the scope of a strategy, `tf.Variable` would create one for each replica.
                self.pairs.append((variable, deepcopy(variable)))
        if self.pairs:
            handles = {id(variable.handle): copy.handle for variable, copy in self.pairs}
            function.set_external_captures([handles.get(id(one), one) for one in function.captured_inputs])

    def refresh(self) -> None:
        """Brings the copies to what their variables are now."""
        for variable, copy in self.pairs:
            copy.assign(variable)

    def written_for(self, variable: Any) -> Any:
        """What the function changes where it would change this variable: its copy, or else itself."""
        copy = self.of(variable)
        return variable if copy is None else copy

    def of(self, variable: Any) -> tf.Variable | None:
        """The copy of a Keras or TensorFlow variable, if the function changes it."""
        return next((copy for original, copy in self.pairs if original is plain(variable)), None)


def _only_read(operation: tf.Operation) -> Collection[int]:
    """Which of its inputs an operation does not change."""
    return range(len(operation.inputs)) if operation.type in _READING else read_only_inputs(operation)
