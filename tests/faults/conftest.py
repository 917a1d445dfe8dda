import functools

import pytest
import runs


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """What a net of `runs` comes to where nothing happens to it, by the net's name."""
    return functools.cache(lambda net: runs.Outcome.uninterrupted(runs.NETS[net], tmp_path_factory.mktemp(net) / "run"))
