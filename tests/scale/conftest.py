"""The scripted engine and the model of the gateway's own tests; Ray on this machine."""

import os
from collections.abc import Iterator

import pytest

from gatewayfixtures import fake, gateway, model_dir, store, strict  # noqa: F401


@pytest.fixture(scope="session")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of this machine alone."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()
