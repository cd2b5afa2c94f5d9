"""A gateway in front of a scripted engine that always has an answer."""

import pytest
from rolloutkit import Served

from gatewayfixtures import fake as fake
from gatewayfixtures import gateway as gateway
from gatewayfixtures import model_dir as model_dir
from gatewayfixtures import store as store
from gatewaykit import Gateway, sampled
from tokentape.testing import FakeSGLang


@pytest.fixture
def served(gateway: Gateway, fake: FakeSGLang) -> Served:
    fake.responder = lambda _: sampled("hello world")
    return Served(gateway, fake)
