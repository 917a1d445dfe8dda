import functools
import signal

import pytest
import runs

# A shell lets what it starts with & ignore it, and so would all processes that are started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The outcome of a net of `runs` that is not interrupted, by the net's name."""
    return functools.cache(lambda net: runs.Outcome.uninterrupted(runs.NETS[net], tmp_path_factory.mktemp(net) / "run"))
