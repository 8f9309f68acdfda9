"""One process with a one-rank process group, shared by the tests that need megatron's layers."""

import pytest


@pytest.fixture(scope="session")
def topology():
    """A one-rank topology; the process group lives as long as the test session."""
    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed

    init_distributed(device="cpu")
    return Topology.build()
