"""The embedded engine itself: exactness, sampling, stops, aborts, pauses, reloads. No HTTP."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import CONTEXT, END, VOCAB, make, save_model
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tokentape.engines.local import LocalEngine, kv, stepper
from tokentape.engines.local.sampler import RowSampler, sample
from tokentape.engines.server.requests import GenerateBody, Generation, SamplingParams
from tokentape.errors import ConfigError, EngineUnavailable, RequestError
from tokentape.types import VersionSpan

TIMEOUT_S = 30


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(model_dir)
    yield engine
    engine.close()


class Job:
    """A submitted generation that can be waited for."""

    def __init__(
        self, engine: LocalEngine, prompt: list[int], body: GenerateBody | None = None, **params: object
    ):
        self._moved = threading.Condition()
        self.generation = Generation(prompt, SamplingParams(**params), body or GenerateBody(stream=True))
        self.generation.on_progress = self._notify
        engine.submit(self.generation)

    def _notify(self) -> None:
        with self._moved:
            self._moved.notify_all()

    def wait(self, num_tokens: int | None = None) -> Generation:
        """Until it has ended, or has `num_tokens` tokens."""
        generation = self.generation

        def done() -> bool:
            enough = num_tokens is not None and len(generation.completion_ids) >= num_tokens
            return enough or generation.finish_reason is not None

        with self._moved:
            assert self._moved.wait_for(done, TIMEOUT_S), generation
        return generation


def run(engine: LocalEngine, prompt: list[int], **params: object) -> Generation:
    return Job(engine, prompt, **params).wait()


def text_ids(text: str) -> list[int]:
    return [b + 1 for b in text.encode()]


def reference(model_dir: Path, generation: Generation, temperature: float = 1.0) -> list[float]:
    """Log-probabilities of the completion by one plain forward pass over prompt and completion."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = generation.prompt_ids + generation.completion_ids
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(generation.prompt_ids) - 1 : -1]
    chosen = torch.tensor(generation.completion_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def assert_exact(model_dir: Path, generation: Generation, temperature: float = 1.0) -> None:
    assert len(generation.logprobs) == len(generation.completion_ids) > 0
    assert generation.logprobs == pytest.approx(reference(model_dir, generation, temperature), abs=1e-5)


def assert_spans(generation: Generation) -> None:
    """The version spans cover 0:C without gap or overlap."""
    ends = [0, *(span.end for span in generation.versions)]
    assert [span.start for span in generation.versions] == ends[:-1]
    assert ends[-1] == len(generation.completion_ids)


# -- exactness


def test_batched_logprobs_are_those_of_a_plain_forward_pass(engine: LocalEngine, model_dir: Path):
    lengths = [
        1,
        3,
        17,
        60,
        5,
        120,
        2,
        33,
        90,
        8,
        41,
        7,
        64,
        12,
        27,
        150,
    ]  # 16 at once, all of different lengths
    jobs = [
        Job(
            engine,
            [(7 * i + j) % 250 for j in range(n)],
            max_new_tokens=20 + 9 * i,
            ignore_eos=True,
            temperature=0.8,
        )
        for i, n in enumerate(lengths)
    ]
    for i, job in enumerate(jobs):
        generation = job.wait()
        assert generation.finish_reason == {"type": "length", "length": 20 + 9 * i}
        assert_exact(model_dir, generation, 0.8)
        assert_spans(generation)


def test_rows_that_join_and_leave_late_stay_exact(engine: LocalEngine, model_dir: Path):
    first = Job(engine, text_ids("a"), max_new_tokens=300, ignore_eos=True)
    first.wait(20)
    # Longer than all that runs: the batch must be laid out anew. Then a short one, and the long one leaves.
    second = Job(engine, [9] * 200, max_new_tokens=30, ignore_eos=True)
    second.wait(3)
    third = Job(engine, [4], max_new_tokens=200, ignore_eos=True)
    for job in (second, third, first):
        assert_exact(model_dir, job.wait())


def test_padding_has_no_part_in_a_row(model_dir: Path):
    """Negative control: the packed batch with its mask inverted to "look at everything" is not exact."""
    engine = LocalEngine(model_dir)
    try:
        blind = kv.PackedBatch(torch.device("cpu"))
        forward = blind.forward

        def look_at_padding(model: kv.Model, tokens: list[int]) -> torch.Tensor:
            blind._mask[:] = True
            return forward(model, tokens)

        blind.forward = look_at_padding  # type: ignore[method-assign]
        engine._stepper._batch = blind
        engine.pause("in_place").result()
        long = Job(engine, [3] * 100, max_new_tokens=10, ignore_eos=True)
        short = Job(engine, [5, 6], max_new_tokens=10, ignore_eos=True)
        engine.resume().result()
        assert_exact(model_dir, long.wait())
        wrong = short.wait()
        assert (
            max(abs(a - b) for a, b in zip(wrong.logprobs, reference(model_dir, wrong), strict=True)) > 1e-3
        )
    finally:
        engine.close()


def test_prefix_cache_reports_honestly_and_stays_exact(engine: LocalEngine, model_dir: Path):
    assert engine.flush_cache().result()
    first = run(engine, text_ids("The quick brown fox"), max_new_tokens=12, ignore_eos=True)
    assert first.num_cached_tokens == 0
    again = run(engine, first.prompt_ids, max_new_tokens=12, ignore_eos=True, temperature=0)
    assert again.num_cached_tokens == len(first.prompt_ids) - 1
    turn = first.prompt_ids + first.completion_ids + text_ids("!?")
    second = run(engine, turn, max_new_tokens=12, ignore_eos=True)
    # The last sampled token was never fed, so its keys are not there; SGLang: 42 + 8 gave 49.
    assert second.num_cached_tokens == len(first.prompt_ids) + 11
    assert_exact(model_dir, second)
    assert engine.flush_cache().result()
    assert run(engine, turn, max_new_tokens=2, ignore_eos=True).num_cached_tokens == 0


def test_prefix_cache_is_bounded():
    cache = kv.PrefixCache(max_bytes=3 * 2 * 40 * 4)
    for start in (0, 100, 200, 300):
        keys = torch.zeros(1, 1, 40, 1)
        cache.put(range(start, start + 40), [(keys, keys.clone())])
    assert cache.longest(list(range(40)), 40)[0] == 0  # the oldest went
    assert cache.longest([*range(300, 330), 7], 40)[0] == 30
    assert cache.longest(list(range(300, 340)), 10)[0] == 10


def test_a_long_prompt_is_prefilled_in_pieces(
    engine: LocalEngine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stepper, "PREFILL_TOKENS", 7)
    monkeypatch.setattr(stepper, "SCORED_TOKENS", 5)
    assert engine.flush_cache().result()
    assert_exact(model_dir, run(engine, [j % 250 for j in range(61)], max_new_tokens=3, ignore_eos=True))
    body = GenerateBody(return_logprob=True, logprob_start_len=4, top_logprobs_num=2)
    scored = Job(engine, [j % 240 for j in range(3, 60)], body, max_new_tokens=0).wait()
    assert scored.num_cached_tokens == 0
    whole = Generation(scored.prompt_ids[:5])
    whole.completion_ids = scored.prompt_ids[5:]
    assert scored.input_logprobs[0] is None
    assert scored.input_logprobs[1:] == pytest.approx(reference(model_dir, whole), abs=1e-5)
    assert scored.input_top_logprobs[0] is None
    assert len(scored.input_top_logprobs) == len(scored.input_logprobs) == 53
    assert scored.finish_reason == {"type": "length", "length": 0}


@pytest.mark.parametrize("start", [0, 10, 20])
def test_a_sampled_completion_scores_the_same_as_a_prompt(engine: LocalEngine, start: int):
    sampled = run(engine, text_ids("0123456789"), max_new_tokens=40, ignore_eos=True)
    body = GenerateBody(return_logprob=True, logprob_start_len=start)
    scored = Job(engine, sampled.prompt_ids + sampled.completion_ids, body, max_new_tokens=0).wait()
    assert scored.num_cached_tokens is not None
    assert scored.num_cached_tokens <= start  # keys may be reused up to where scores are wanted
    assert len(scored.input_logprobs) == 50 - start
    num = min(40, 49 - start)
    assert scored.input_logprobs[-num:] == pytest.approx(sampled.logprobs[-num:], abs=1e-5)


def test_sliding_window_models_are_exact_in_a_batch(tmp_path: Path):
    make(
        tmp_path,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    engine = LocalEngine(tmp_path)
    try:
        prompts = [[5] * 40, [6, 7], list(range(100))]
        for job in [Job(engine, p, max_new_tokens=40, ignore_eos=True) for p in prompts]:
            assert_exact(tmp_path, job.wait())
    finally:
        engine.close()


def test_models_with_a_recurrent_state_run_one_by_one(tmp_path: Path, model_dir: Path):
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(1)
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        max_position_embeddings=CONTEXT,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    Qwen3_5ForCausalLM(config).save_pretrained(tmp_path)
    engine = LocalEngine(tmp_path)
    try:
        jobs = [Job(engine, [5] * n, max_new_tokens=12, ignore_eos=True) for n in (3, 30)]
        for job in jobs:
            generation = job.wait()
            assert generation.num_cached_tokens == 0
            assert_exact(tmp_path, generation)
    finally:
        engine.close()


# -- sampling


def test_a_seed_repeats_alone_and_in_company(engine: LocalEngine):
    params = {"max_new_tokens": 60, "sampling_seed": 11, "ignore_eos": True}
    alone = run(engine, text_ids("seed"), **params)
    company = [Job(engine, [i] * 30, max_new_tokens=80, top_p=0.5, ignore_eos=True) for i in range(5)]
    together = run(engine, text_ids("seed"), **params)
    assert together.completion_ids == alone.completion_ids
    assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    other = run(engine, text_ids("seed"), **{**params, "sampling_seed": 12})
    assert other.completion_ids != alone.completion_ids
    for job in company:
        job.wait()


def test_without_a_seed_every_generation_differs(engine: LocalEngine):
    a, b = (run(engine, [1, 2], max_new_tokens=40, ignore_eos=True, temperature=2.0) for _ in range(2))
    assert a.completion_ids != b.completion_ids


def test_greedy_is_unscaled(engine: LocalEngine, model_dir: Path):
    zero = run(engine, text_ids("greedy"), max_new_tokens=20, temperature=0, ignore_eos=True)
    assert_exact(model_dir, zero)
    top_1 = run(engine, text_ids("greedy"), max_new_tokens=20, temperature=0.5, top_k=1, ignore_eos=True)
    assert top_1.completion_ids == zero.completion_ids
    assert_exact(model_dir, top_1, 0.5)


def sampler(**params: object) -> RowSampler:
    stop_ids = frozenset({1})
    return RowSampler(
        SamplingParams(**params), stop_ids, num_prompt=0, vocab_size=4, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.3}, {0, 1}),
        ({"min_new_tokens": 5}, {0, 2, 3}),
        ({"logit_bias": {"0": -100.0, "3": 2.0}}, {1, 2, 3}),
        ({"temperature": 0.0}, {0}),
    ],
)
def test_truncation_limits_what_is_drawn_and_leaves_the_logprob(params: dict[str, object], allowed: set[int]):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    seen: set[int] = set()
    for seed in range(200):
        row = sampler(sampling_seed=seed, **params)
        drawn = sample(logits, [row])
        seen.add(drawn.ids[0])
        if "min_new_tokens" not in params and "logit_bias" not in params:
            assert drawn.logprobs[0] == pytest.approx(logits[0, drawn.ids[0]].item(), abs=1e-6)
    assert seen == allowed


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    row, counts = sampler(sampling_seed=3), [0, 0, 0, 0]
    for _ in range(4000):
        counts[sample(logits, [row]).ids[0]] += 1
    assert [c / 4000 for c in counts] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_penalties_look_at_sampled_tokens_only():
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    row = sampler(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    for token in (0, 0, 1):
        row.observe(token)
    adjusted = logits.clone()
    row.adjust(adjusted[0])
    assert adjusted[0].tolist() == pytest.approx([2.0 / 2 - 1.0 - 0.25, -1.0 * 2 - 0.5 - 0.25, 0.5, 0.0])


def test_logits_that_are_not_finite_end_the_generation_with_our_own_error(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
):
    model = engine._stepper._model

    def broken(**kwargs: object) -> object:
        output = model(**kwargs)
        output.logits = output.logits * torch.nan
        return output

    with monkeypatch.context() as patch:
        patch.setattr(engine._stepper, "_model", broken)
        reason = run(engine, [1, 2, 3], max_new_tokens=5).finish_reason
    assert reason is not None
    assert (reason["type"], reason["status_code"]) == ("abort", 500)
    assert "not finite" in reason["message"]
    assert run(engine, [1, 2, 3], max_new_tokens=2, ignore_eos=True).completion_ids  # the engine lives on


# -- stops


def test_stop_token_ids_and_ignore_eos(engine: LocalEngine):
    free = run(engine, text_ids("stop"), max_new_tokens=30, temperature=0, ignore_eos=True)
    stop = free.completion_ids[5]
    stopped = run(engine, text_ids("stop"), max_new_tokens=30, temperature=0, stop_token_ids=[stop])
    first = free.completion_ids.index(stop)
    assert stopped.completion_ids == free.completion_ids[: first + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": stop}
    assert len(stopped.logprobs) == first + 1
    last = run(engine, text_ids("stop"), max_new_tokens=first + 1, temperature=0, stop_token_ids=[stop])
    assert last.finish_reason == {"type": "stop", "matched": stop}  # wins over the length
    ignored = run(
        engine, text_ids("stop"), max_new_tokens=9, temperature=0, stop_token_ids=[stop], ignore_eos=True
    )
    assert ignored.finish_reason == {"type": "length", "length": 9}


def test_end_of_turn_comes_from_the_model(engine: LocalEngine):
    ended = run(engine, [1, 2], max_new_tokens=400, logit_bias={str(END): 6.0})
    assert ended.finish_reason == {"type": "stop", "matched": END}
    assert ended.completion_ids[-1] == END
    late = run(engine, [1, 2], max_new_tokens=400, min_new_tokens=50, logit_bias={str(END): 20.0})
    assert late.completion_ids.index(END) == 50


def test_stop_strings_end_at_the_token_that_completes_them(engine: LocalEngine):
    # Two printable tokens forced in turn: "ab" can only be completed by a "b".
    bias = {str(engine.encode("a")[0]): 50.0, str(engine.encode("b")[0]): 50.0}
    stopped = run(engine, [1], max_new_tokens=300, logit_bias=bias, stop=["zz", "abba"], sampling_seed=5)
    assert stopped.finish_reason == {"type": "stop", "matched": "abba"}
    text = engine.decode(stopped.completion_ids)
    assert text.endswith("abba")
    assert text.count("abba") == 1


def test_null_max_new_tokens_runs_to_the_end_of_the_context(engine: LocalEngine, model_dir: Path):
    generation = run(engine, [3] * 400, max_new_tokens=None, ignore_eos=True)
    assert len(generation.completion_ids) == CONTEXT - 400
    assert generation.finish_reason == {"type": "length", "length": CONTEXT - 400}
    assert_exact(model_dir, generation)


# -- aborts, pauses, reloads


def forever(engine: LocalEngine, rid: str = "", **params: object) -> Job:
    body = GenerateBody(rid=rid, stream=True)
    return Job(engine, [1, 2, 3], body, **{"max_new_tokens": 500, "ignore_eos": True, **params})


def test_abort_answers_what_there_is(engine: LocalEngine, model_dir: Path):
    job = forever(engine, "abort-me")
    job.wait(5)
    engine.abort("abort-me")
    generation = job.wait()
    assert generation.finish_reason == Generation.ABORTED
    assert 5 <= len(generation.completion_ids) < 500
    assert_exact(model_dir, generation)
    assert_spans(generation)


def test_a_rid_is_a_prefix_only_when_it_is_in_flight_itself(engine: LocalEngine):
    one, ten, other = forever(engine, "p-1"), forever(engine, "p-10"), forever(engine, "q")
    ten.wait(2)
    engine.abort("p-")
    engine.abort("nobody")
    num = len(ten.generation.completion_ids)
    assert ten.wait(num + 10).finish_reason is None
    engine.abort("p-1")
    assert one.wait().finish_reason == ten.wait().finish_reason == Generation.ABORTED
    assert other.generation.finish_reason is None
    engine.abort("", everything=True)
    assert other.wait().finish_reason == Generation.ABORTED


def test_duplicate_rid_in_flight(engine: LocalEngine):
    job = forever(engine, "dup")
    with pytest.raises(RequestError, match="Duplicate request ID detected: dup"):
        forever(engine, "dup")
    engine.abort("dup")
    job.wait()
    again = forever(engine, "dup", max_new_tokens=2).wait()
    assert again.finish_reason == {"type": "length", "length": 2}


def test_more_than_the_batch_wait_their_turn_and_can_be_aborted_waiting(model_dir: Path):
    engine = LocalEngine(model_dir, max_batch=2)
    try:
        jobs = [forever(engine, f"w{i}", max_new_tokens=300) for i in range(3)]
        jobs[1].wait(2)
        assert not jobs[2].generation.completion_ids
        engine.abort("w2")
        waiting = jobs[2].wait()
        assert waiting.finish_reason == Generation.ABORTED
        assert waiting.completion_ids == []
        assert waiting.versions == [VersionSpan("default", 0, 0)]
        assert all(job.wait().finish_reason == {"type": "length", "length": 300} for job in jobs[:2])
    finally:
        engine.close()


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_generation_goes_on(engine: LocalEngine, model_dir: Path, mode: str):
    jobs = [Job(engine, [9, 8, i], max_new_tokens=200, ignore_eos=True, sampling_seed=i) for i in range(3)]
    jobs[-1].wait(10)
    engine.pause(mode).result()
    nums = [len(job.generation.completion_ids) for job in jobs]
    late = Job(engine, [1], max_new_tokens=3, ignore_eos=True)
    assert not engine.flush_cache().result()
    assert [len(job.generation.completion_ids) for job in jobs] == nums
    assert late.generation.completion_ids == []
    engine.resume().result()
    for i, job in enumerate(jobs):
        generation = job.wait()
        assert generation.num_retractions == (mode == "retract")
        assert_exact(model_dir, generation)
        unbroken = run(engine, [9, 8, i], max_new_tokens=200, ignore_eos=True, sampling_seed=i)
        assert unbroken.completion_ids == generation.completion_ids
    assert len(late.wait().completion_ids) == 3


def test_pause_aborts_by_default_and_holds_what_comes(engine: LocalEngine):
    job = forever(engine)
    job.wait(3)
    engine.pause("abort").result()
    assert job.wait().finish_reason == Generation.ABORTED
    held = forever(engine, max_new_tokens=2)
    assert held.generation.finish_reason is None
    engine.resume().result()
    assert held.wait().finish_reason == {"type": "length", "length": 2}


def test_reload_under_a_running_generation(model_dir: Path, tmp_path: Path):
    save_model(tmp_path, seed=5)
    engine = LocalEngine(model_dir)
    try:
        old = run(engine, [1, 2, 3], max_new_tokens=5, temperature=0, ignore_eos=True)
        job = forever(engine)
        job.wait(20)
        engine.update_weights(str(tmp_path), "v2").result()
        generation = job.wait()
        assert [span.version for span in generation.versions] == ["default", "v2"]
        assert generation.weight_version == "v2"
        assert_spans(generation)
        before = generation.versions[0].end
        old_half = Generation(generation.prompt_ids)
        old_half.completion_ids = generation.completion_ids[:before]
        assert generation.logprobs[:before] == pytest.approx(reference(model_dir, old_half), abs=1e-5)
        fresh = run(engine, [1, 2, 3], max_new_tokens=5, temperature=0, ignore_eos=True)
        assert fresh.num_cached_tokens == 0  # keys of the old weights are forgotten
        assert fresh.versions == [VersionSpan("v2", 0, 5)]
        assert_exact(tmp_path, fresh)
        assert fresh.logprobs != pytest.approx(old.logprobs, abs=1e-3)
        engine.set_weight_version("v3").result()
        assert engine.weight_version == "v3"
    finally:
        engine.close()


def test_a_reload_that_does_not_fit_changes_nothing(engine: LocalEngine, tmp_path: Path):
    make(tmp_path / "wide", hidden=64)
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("wide", "not the model that is running"),
        ("empty", "config.json"),
        ("gone", "no such"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.update_weights(str(tmp_path / name), "bad").result()
    assert engine.weight_version == "default"
    assert run(engine, [1], max_new_tokens=1, ignore_eos=True).weight_version == "default"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_died(model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    engine = LocalEngine(model_dir)
    job = forever(engine)
    job.wait(2)
    monkeypatch.setattr(engine, "_reap", lambda: 1 / 0)
    reason = job.wait().finish_reason
    assert reason is not None
    assert reason["status_code"] == 500
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        engine.flush_cache()
    engine.close()


def test_stop_ids_beyond_the_vocabulary_never_match(engine: LocalEngine):
    generation = run(engine, [1], max_new_tokens=4, min_new_tokens=4, stop_token_ids=[VOCAB + 7, -3])
    assert len(generation.completion_ids) == 4


def test_close_aborts_and_refuses(model_dir: Path):
    engine = LocalEngine(model_dir)
    job = forever(engine)
    job.wait(2)
    engine.close()
    assert job.wait().finish_reason == Generation.ABORTED
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        forever(engine)


# -- model directories


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_an_incomplete_directory_names_what_is_missing(
    model_dir: Path, tmp_path: Path, missing: str, named: str
):
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / missing).unlink()
    with pytest.raises(ConfigError, match=named):
        LocalEngine(directory)


def test_a_missing_directory_or_a_weight_that_is_not_there(model_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no such directory"):
        LocalEngine(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="dtype"):
        LocalEngine(model_dir, dtype="int3")
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"weights are missing: model\.layers\.2"):
        LocalEngine(directory)


def test_facts(engine: LocalEngine, model_dir: Path):
    facts = engine.facts
    assert (facts.vocab_size, facts.context_length, facts.device, facts.dtype) == (
        VOCAB,
        CONTEXT,
        "cpu",
        "float32",
    )
    assert facts.architectures == ("Qwen3ForCausalLM",)
    assert engine.decode(engine.encode("héllo<|im_end|>")) == "héllo"
    assert engine.decode(engine.encode("a<|im_end|>"), skip_special_tokens=False) == "a<|im_end|>"
    short = LocalEngine(model_dir, context_length=64)
    assert short.facts.context_length == 64
    short.close()


def test_a_caller_that_leaves_does_not_stop_the_engine(engine: LocalEngine) -> None:
    """A client that times out on a control route cancels its future; the thread must live."""
    for _ in range(50):
        engine.set_weight_version("v").cancel()
    assert engine.set_weight_version("after").result(timeout=30) is None  # the negative control
    assert engine.healthy
    assert engine.weight_version == "after"
