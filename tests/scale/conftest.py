"""The scripted engine and the model of the gateway's own tests; Ray on this machine."""

from collections.abc import Iterator

import pytest

from gatewayfixtures import fake, gateway, model_dir, store, strict  # noqa: F401


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray of this machine alone."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()
