"""What a gateway tells of itself: every metric is documented, every turn has its line, `top` shows both."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gatewaykit import USER, Gateway, sampled
from serving import run
from tokentape.cli.options import _JsonLines
from tokentape.cli.top import Snapshot, percentile
from tokentape.errors import InternalError
from tokentape.gateway.clock import note_failure
from tokentape.testing import FakeSGLang, Fault

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|\S+)(?: |$)')


async def scrape(gateway: Gateway) -> dict[str, float]:
    text = (await gateway.request("GET", "/metrics")).body.decode()
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def parse(line: str) -> dict[str, str]:
    pairs = PAIR.findall(line)
    assert " ".join(f"{name}={value}" for name, value in pairs) == line
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


async def test_turns_are_spans_where_an_sdk_is_set_up(
    fake: FakeSGLang, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a turn, its stages inside it, in their order; a failed one says why."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    session_id = await gateway.create()
    fake.script(sampled("hello"), sampled("hello"), Fault("status", status=500))
    await gateway.chat(session_id, [USER])
    assert not exporter.get_finished_spans()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    reply = await gateway.chat(session_id, [USER])
    *stages, turn = exporter.get_finished_spans()
    assert (turn.name, [stage.name for stage in stages]) == ("turn", ["plan", "engine", "commit"])
    assert turn.attributes is not None
    assert turn.attributes["tokentape.turn"] == reply["tokentape"]["turn_id"]
    times = [(stage.start_time, stage.end_time) for stage in stages]
    assert [start for start, _ in times[1:]] == [end for _, end in times[:-1]]
    assert (times[0][0], times[-1][1]) == (turn.start_time, turn.end_time)
    assert all(stage.parent == turn.context for stage in stages)
    exporter.clear()
    await gateway.post(session_id, {"messages": [USER]})
    [failed] = exporter.get_finished_spans()
    assert (failed.name, failed.status.status_code) == ("turn", trace.StatusCode.ERROR)
    assert failed.attributes is not None
    assert failed.attributes["tokentape.kind"] == "engine_failed"


async def test_every_metric_is_documented(gateway: Gateway) -> None:
    text = (await gateway.request("GET", "/metrics")).body.decode()
    names = [family.name for family in text_string_to_metric_families(text)]
    there = {name for name in names if name.startswith("tokentape_") and not name.endswith("_created")}
    table = [line for line in DOCS.read_text().splitlines() if line.startswith("| `tokentape_")]
    documented = {name for line in table for name in re.findall(r"`(tokentape_\w+)`", line.split("|")[1])}
    assert there == documented


async def test_a_session_is_counted(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled("hello"), sampled("world"), Fault("status", status=500))
    session_id = await gateway.create()
    first = await gateway.chat(session_id, [USER])
    history = [USER, first["choices"][0]["message"], USER]
    second = await gateway.chat(session_id, history, stream=True)
    assert second["choices"][0]["message"]["content"] == "world"
    retry = await gateway.request(
        "POST",
        f"/sessions/{session_id}/v1/chat/completions",
        {"model": "policy", "messages": [USER]},
        {"x-stainless-retry-count": "1"},
    )
    assert retry.status == 200
    assert (await gateway.post(session_id, {"messages": [USER, USER]})).status == 502
    before = await scrape(gateway)
    await gateway.ok("POST", f"/sessions/{session_id}/finish", {"reward": 1})
    now = await scrape(gateway)
    num_sampled = sum(len(r.output_ids) for r in fake.requests)
    assert now["tokentape_turns_total|stop"] == 2
    assert now["tokentape_extended_turns_total"] == 1
    assert now["tokentape_branches_total|root"] == 1
    assert now["tokentape_answered_again_total"] == 1
    assert now["tokentape_failures_total|engine_failed"] == 1
    assert (before["tokentape_trained_tokens_total"], now["tokentape_trained_tokens_total"]) == (
        0,
        num_sampled,
    )
    assert {now[f"tokentape_stage_seconds_count|{stage}"] for stage in ("engine", "commit")} == {2}
    assert now["tokentape_stage_seconds_count|plan"] == 3
    assert now["tokentape_first_token_seconds_count"] == 1
    assert now["tokentape_store_changes_sum"] >= 4
    assert now["tokentape_store_seconds_count"] == now["tokentape_store_changes_count"]
    assert now["process_open_fds"] > 0


async def test_every_turn_has_its_line(
    fake: FakeSGLang, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tokentape.turns")
    fake.script(sampled("hello"), Fault("status", status=500, message='a \n new=line \u2028 "quoted"'))
    session_id = await gateway.create(session_id="s:1~x")
    reply = await gateway.chat(session_id, [USER])
    await gateway.post(session_id, {"messages": [USER, USER]})
    records = [record for record in caplog.records if record.name == "tokentape.turns"]
    done, failed = (parse(record.getMessage()) for record in records)
    assert list(done)[:3] == ["session", "turn", "outcome"]
    assert (done["session"], done["turn"]) == ("s:1~x", reply["id"])
    assert (done["outcome"], done["branch_reason"], done["finish"]) == ("committed", "root", "stop")
    assert int(done["sampled"]) == len(fake.requests[0].output_ids)
    assert int(done["prompt"]) == int(done["new"]) == len(fake.requests[0].input_ids)
    assert float(done["total_ms"]) >= float(done["engine_ms"]) > 0
    assert (failed["outcome"], failed["kind"]) == ("failed", "engine_failed")
    assert "new=line" in failed["error"]
    assert all(len(record.getMessage().splitlines()) == 1 for record in records)
    line = json.loads(_JsonLines().format(records[0]))
    assert (line["session"], line["logger"]) == ("s:1~x", "tokentape.turns")
    assert line["sampled"] == int(done["sampled"])


@pytest.mark.parametrize("text", ["", "a b", "a=b", '"', "\n", "\x00", "\u2028", "é", "plain"])
def test_a_value_is_read_back(text: str, caplog: pytest.LogCaptureFixture) -> None:
    note_failure("s", InternalError(text), 3)
    assert parse(caplog.records[0].getMessage())["error"] == text


async def test_top(fake: FakeSGLang, gateway: Gateway) -> None:
    fake.script(sampled("hello"))
    await gateway.chat(await gateway.create(), [USER])
    code, stdout, stderr = await run("top", gateway.url, "--once")
    assert (code, stderr) == (0, "")
    assert "1 root" in stdout
    assert fake.url in stdout
    assert "healthy" in stdout
    code, stdout, stderr = await run("top", "http://127.0.0.1:1", "--once")
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1


def test_percentiles_are_those_of_what_is_new() -> None:
    def snapshot(*counts: float) -> Snapshot:
        limits = ("0.1", "1.0", "+Inf")
        name = "tokentape_stage_seconds_bucket"
        return Snapshot(
            0.0, {(name, (("le", le), ("stage", "plan"))): n for le, n in zip(limits, counts, strict=True)}
        )

    before, now = snapshot(100, 100, 100), snapshot(101, 110, 110)
    assert percentile(now, before, 0.5, "stage_seconds", stage="plan") == 1.0
    assert percentile(now, Snapshot(0.0), 0.5, "stage_seconds", stage="plan") == 0.1
    assert percentile(now, now, 0.5, "stage_seconds", stage="plan") is None


def test_a_log_of_json_lines(tmp_path: Path) -> None:
    script = (
        "from tokentape.cli.options import log_to_stderr; import logging; log_to_stderr('info', 'json')\n"
    )
    script += "try: 1/0\nexcept ZeroDivisionError: logging.getLogger('x').exception('a\\nb')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["message"] == "a\nb"
    assert "ZeroDivisionError" in json.loads(line)["exception"]
