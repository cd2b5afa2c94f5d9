"""Real, unmodified agents end to end: the gateway serves them exactly, and the README says so."""

from pathlib import Path

import pytest
from agentkit import Case, play, row_in_readme, write_row
from clis import CLIS
from sdks import SDKS

from gatewaykit import Gateway
from tokentape.testing import FakeSGLang

CASES = [*SDKS, *CLIS]


@pytest.mark.live
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.agent}-{case.protocol}") for case in CASES])
async def test_an_agent(
    case: Case, fake: FakeSGLang, gateway: Gateway, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    row = await play(case, fake, gateway, tmp_path)
    if pytestconfig.getoption("--write-agents", default=False):
        write_row(row, [(one.agent, one.protocol) for one in CASES])
    assert row_in_readme(row) == str(row), (
        "the README says otherwise: pytest -m live tests/agents --write-agents"
    )
