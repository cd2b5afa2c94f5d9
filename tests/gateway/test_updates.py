"""The embedded engine changes its weights again and again in the middle of turns: nothing is lost."""

import asyncio
from pathlib import Path

from tokentape.engines.local import LocalEngine
from tokentape.engines.server import make_app, serve
from tokentape.model import TINY_MODEL
from updatekit import Updates, check, perturbed, sessions, updating


async def test_a_run_under_updates(tmp_path: Path) -> None:
    other = await asyncio.to_thread(perturbed, TINY_MODEL, tmp_path / "other", scale=0.25)
    engine = await asyncio.to_thread(LocalEngine, TINY_MODEL)
    try:
        async with serve(make_app(engine)) as url:
            updates = Updates(url, [TINY_MODEL, other], every_s=0.1)
            async with updating(updates):
                rows = await sessions(url, TINY_MODEL, num_sessions=6, num_turns=4, max_tokens=120)
    finally:
        engine.close()
    checked = await asyncio.to_thread(check, rows, updates.weights)
    assert checked.num_turns == 6 * 4
    assert checked.num_mixed >= 3, "no turn had an update in its middle: this run proves nothing"
    assert len(checked.own) >= 3
    assert checked.worst <= 1e-3
    assert sum(checked.other) / len(checked.other) > 0.1, "both weights say the same: this run proves nothing"
