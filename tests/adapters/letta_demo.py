"""Two steps of a real Letta agent, with Letta's own adapter and with ours: which prompts extend?"""

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import letta
from lettakit import CONTEXT, LettaServer, as_before, extends, letta_server, llm_config, tell

from gatewaykit import TOKENIZER, sampled
from tokentape.adapters import letta as ours
from tokentape.testing import FakeSGLang, write_model_dir

FIRST = ("I ask.\n" + tell("Who is in Zürich?"), tell("And in Oslo?"), "hello, the tool is done")
STEPS = (
    ("Who is in Zürich?", FIRST),
    ("And what is the weather?", (tell("What is the weather?"), "the weather is hello world")),
)


def say(line: str = "") -> None:
    sys.stdout.write(line + "\n")


async def run(server: LettaServer, model: Path, which: str) -> str:
    async with FakeSGLang(TOKENIZER, context_length=CONTEXT) as fake:
        agent_id = await server.agent(llm_config(fake.url, model))
        say(f"\n{which}\n  step  call  prompt tokens  sampled  extends what the model saw and sampled")
        at = 0
        for number, (question, replies) in enumerate(STEPS, 1):
            fake.script(*(sampled(text, seed=at + n) for n, text in enumerate(replies)))
            await server.step(agent_id, question)
            for received in fake.requests[at:]:
                exact = "-" if at == 0 else "yes" if extends(fake)[at - 1] else "NO"
                tokens = f"{len(received.input_ids):13}  {len(received.output_ids):7}"
                at += 1
                say(f"  {number:4}  {at:4}  {tokens}  {exact}")
        return agent_id


async def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model_dir(Path(scratch) / "model", tokenizer=TOKENIZER, context_length=CONTEXT)
        async with letta_server(Path(scratch)) as server:
            say(f"letta {letta.__version__}, real agent loop; the engine is a fake SGLang")
            await run(server, model, "Letta's own SGLangNativeAdapter")
            with as_before():
                tapes = ours.install()
                agent_id = await run(server, model, "tokentape.adapters.letta.install()")
                samples = await tapes.samples(agent_id)
                await tapes.aclose()
            for sample in samples:
                trained, size = sum(sample["loss_mask"]), len(sample["token_ids"])
                say(f"  one tape: {size} token ids, {trained} trained, {len(sample['turns'])} turns")


asyncio.run(main())
