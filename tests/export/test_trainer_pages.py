"""The trainers' pages: their examples run, with the trainers' own packages where they are installed."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from manualkit import DOCS, RECORDED, missing, needs, snippets, write_recorded
from tokentape.engines.sglang import SGLangConfig
from tokentape.gateway.service import ServiceConfig, running
from tokentape.testing import FakeSGLang, Reply, byte_level_tokenizer, write_model_dir

PAGES = sorted((DOCS / "trainers").glob("*.md"))
PINS = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("requirements*.txt")))
GATEWAY = "http://127.0.0.1:8000"
OPENAI = "[{'role': 'user', 'content': 'Say hello.'}]"

# What a trainer does with a page's class or function: before and behind the snippet.
CALLED: dict[str, tuple[str, str]] = {
    "verl": ("", f"""
import asyncio
given = {{"temperature": 1.0, "top_p": 1.0}}
output = asyncio.run(TokentapeLoop.run(None, given, raw_prompt={OPENAI}))
print(sum(output.response_mask), "trained,", output.reward_score)
"""),
    "openrlhf": ("", """
import asyncio, types
given = types.SimpleNamespace(temperature=1.0)
output = asyncio.run(AgentExecutor().execute("Say hello.", "label", given, 512, None, None))
print(sum(end - start for start, end in output["action_ranges"]), "trained,", output["reward"])
"""),
    "areal": ("", f"""
import asyncio
batch = asyncio.run(TokentapeWorkflow().arun_episode(None, {{"messages": {OPENAI}}}))
print(int(batch["loss_mask"].sum()), "trained,", float(batch["rewards"][0]))
"""),
    # Its own classes are pydantic's, which before Python 3.12 takes another TypedDict only.
    "skyrl": ("import typing, typing_extensions\ntyping.TypedDict = typing_extensions.TypedDict\n", f"""
from skyrl.train.generators.base import TrajectoryID
asked = {{"prompts": [{OPENAI}] * 2, "trajectory_ids": [TrajectoryID("a", 0), TrajectoryID("a", 1)]}}
output = asyncio.run(TokentapeGenerator().generate(asked))
print(sum(map(sum, output["loss_masks"])), "trained,", output["rewards"][0])
"""),
    "slime": ("""
import sys, types
class Output:
    def __init__(self, samples):
        self.samples = samples
class Sample:
    from_dict = staticmethod(dict)
for name in ("slime", "slime.rollout", "slime.rollout.base_types", "slime.utils", "slime.utils.types"):
    sys.modules[name] = types.SimpleNamespace(RolloutFnTrainOutput=Output, Sample=Sample)
""", """
import types
asked = [types.SimpleNamespace(prompt="Say hello.")] * 2
source = types.SimpleNamespace(get_samples=lambda number: [asked] * number)
[[row, _], _] = generate_rollout(types.SimpleNamespace(rollout_batch_size=2), 0, source).samples
print(sum(row["loss_mask"]), "trained,", row["reward"])
"""),
}  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "code"),
    [
        pytest.param(page.stem, code, id=name)
        for page in PAGES
        for name, code in snippets("python", [page])
        if needs(code) or "from episode" in code
    ],
)
async def test_an_example_runs(stem: str, code: str, tmp_path: Path) -> None:
    if missing(code):
        pytest.skip(f"needs {', '.join(missing(code))}: make trainers")
    if RECORDED in code:
        await write_recorded(tmp_path)
    if "from episode" not in code:
        assert await run(code, tmp_path)
        return
    before, behind = CALLED[stem]
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        end = fake.tokenizer.token_to_id("<|im_end|>")
        fake.responder = lambda _: Reply(ids=[*fake.tokenizer.encode("hello world").ids, end])
        model, store = write_model_dir(tmp_path / "model"), tmp_path / "s.sqlite"
        config = ServiceConfig(model=str(model), engine=SGLangConfig(fake.url), store=store)
        async with running(config) as url:
            [shared] = [
                c for _, c in snippets("python", [DOCS / "trainers.md"]) if c.startswith("# episode.py")
            ]
            (tmp_path / "episode.py").write_text(shared.replace(GATEWAY, url))
            said = await run(before + code + behind, tmp_path)
    assert re.search(r"[1-9]\d* trained, 1\.0", said)


async def run(code: str, directory: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def test_versions_are_those_that_are_tested() -> None:
    named = [need for page in PAGES for _, code in snippets("python", [page]) for need in needs(code)]
    assert len(named) >= 6
    assert [
        f"{name}=={version}" for name, version in named if f"\n{name}=={version}\n" not in f"\n{PINS}"
    ] == []
    for page in PAGES:
        for name, version in re.findall(r"\b([a-z-]+) (\d+\.\d+\.\d+)", page.read_text().split("##")[0]):
            assert f"\n{name}=={version}\n" in f"\n{PINS}", page.name


def test_every_page_says_what_was_tested() -> None:
    for page in PAGES:
        assert "tests/export/test_" in page.read_text(), page.name
