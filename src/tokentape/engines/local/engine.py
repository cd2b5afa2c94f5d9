"""The embedded engine: any Hugging Face causal language model on CPU or GPU, batched by token steps.

One thread owns the model. Between two steps it takes in what has changed (new generations, aborts, a pause,
new weights), lets the waiting join, then steps all that run. Everything else only leaves it messages.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from tokentape.engines.local import checkpoint
from tokentape.engines.local.stepper import Row, Stepper, failure
from tokentape.engines.server import app as server
from tokentape.engines.server.requests import Generation
from tokentape.errors import EngineUnavailable, RequestError

T = TypeVar("T")

# Below this size a step is many tiny operations, and threads that wait for each other at each one cost more
# than they give: 1.6 M parameters, 8 rows, two busy cores: 37 to 142 tokens/s with two threads, 1,500 with
# one.
ONE_THREAD_PARAMETERS = 50_000_000


class Event(Protocol):
    """What `run_engine` uses of an `asyncio.Event`."""

    async def wait(self) -> object:
        """Wait until it is set."""
        ...


class LocalEngine:
    """Serves `Generation`s with a model directory's weights. Satisfies `server.ServedEngine`.

    `device` auto: the first GPU, else the CPU. `dtype` auto: bfloat16 on a GPU, float32 on the CPU.
    `context_length` defaults to the model's own (tokens). `max_batch` generations run together, more wait.
    `prefix_cache_bytes` of keys and values of finished generations are kept for prompts that begin with the
    same ids. `num_threads` of CPU compute (PyTorch's process-wide setting): one for a small model, else
    PyTorch's own choice.

    Raises `ConfigError` when the directory lacks a file or the model cannot be loaded. Methods may be called
    from any thread.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 32,
        context_length: int | None = None,
        prefix_cache_bytes: int = 1 << 29,
        num_threads: int | None = None,
    ) -> None:
        loaded = checkpoint.load(model_dir, device=device, dtype=dtype, context_length=context_length)
        self._tokenizer = loaded.tokenizer
        self._stepper = Stepper(loaded, prefix_cache_bytes=prefix_cache_bytes)
        self._num_threads = num_threads
        if num_threads is None and loaded.num_parameters < ONE_THREAD_PARAMETERS:
            self._num_threads = 1
        self.facts = server.EngineFacts(
            model_path=str(model_dir),
            model_type=loaded.model.config.model_type,
            architectures=tuple(loaded.model.config.architectures or ()),
            context_length=loaded.context_length,
            vocab_size=loaded.vocab_size,
            device=str(loaded.device),
            dtype=str(loaded.dtype).removeprefix("torch."),
            max_batch=max_batch,
        )
        # Guarded by `_changed`: what other threads write. The rest belongs to the engine's thread.
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._inbox: deque[tuple[Future[Any], Callable[[], None]]] = deque()
        self._in_flight: dict[str, Generation] = {}
        self._closed = False
        self._paused = False
        self._thread = threading.Thread(target=self._run, name="tokentape-engine", daemon=True)
        self._thread.start()

    @property
    def weight_version(self) -> str:
        """The name of the weights that sample now."""
        return self._stepper.weight_version

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is at work."""
        return self._thread.is_alive() and not self._closed

    def submit(self, generation: Generation) -> None:
        """Queue a checked generation. Raises `RequestError` for a rid in flight, or `EngineUnavailable`."""
        row = self._stepper.row(generation)
        with self._changed:
            if not self.healthy:
                raise EngineUnavailable("the embedded engine is closed")
            if generation.rid in self._in_flight:
                raise RequestError(f"Duplicate request ID detected: {generation.rid}", param="rid")
            self._in_flight[generation.rid] = generation
            self._waiting.append(row)
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Abort this one generation before the next step; nothing happens when it has ended."""
        with self._changed:
            generation.cancelled = True
            self._changed.notify()

    def abort(self, rid: str, *, everything: bool = False) -> None:
        """Abort the generation named `rid` and, like SGLang, every other whose rid begins with it.

        A `rid` that is not itself in flight aborts nothing: on a real server a bare prefix had no effect
        either.
        """
        with self._changed:
            if everything or rid in self._in_flight:
                for other, generation in self._in_flight.items():
                    generation.cancelled |= everything or other.startswith(rid)
            self._changed.notify()

    def pause(self, mode: str) -> "Future[None]":
        """Stop stepping: `abort` ends all, `in_place` freezes it, `retract` forgets its keys too."""

        def pause() -> None:
            self._paused = True
            if mode == "abort":
                self.abort("", everything=True)
            elif mode == "retract":
                self._retract()

        return self._call(pause)

    def resume(self) -> "Future[None]":
        """Step again after `pause`."""

        def resume() -> None:
            self._paused = False

        return self._call(resume)

    def update_weights(self, model_path: str, weight_version: str | None) -> "Future[None]":
        """Load weights of the same shapes before the next step; running generations carry on with them.

        Their keys and values stay as the old weights computed them; the prefix cache is emptied. The future
        raises `ConfigError`, and the old weights stay, when the directory does not fit.
        """
        return self._call(lambda: self._stepper.reload(model_path, weight_version))

    def set_weight_version(self, weight_version: str) -> "Future[None]":
        """Rename the weights, from the next token on."""

        def rename() -> None:
            self._stepper.weight_version = weight_version

        return self._call(rename)

    def flush_cache(self) -> "Future[bool]":
        """Empty the prefix cache, unless something runs or waits: False then."""

        def flush() -> bool:
            if self._in_flight:
                return False
            self._stepper.flush()
            return True

        return self._call(flush)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text → ids, with the special tokens that the tokenizer adds by itself, as SGLang's `text` field."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Ids → text."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def close(self) -> None:
        """Abort everything and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _call(self, job: Callable[[], T]) -> "Future[T]":
        """Have a job done between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():  # whoever asked has left
                return
            try:
                future.set_result(job())
            except Exception as error:  # the boundary: raised again where the future is awaited
                future.set_exception(error)

        with self._changed:
            if not self.healthy:
                raise EngineUnavailable("the embedded engine is closed")
            self._inbox.append((future, run))
            self._changed.notify()
        return future

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        finally:
            self._abandon()

    def _turn(self) -> bool:
        """Everything between two steps, then one step; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            jobs = [self._inbox.popleft()[1] for _ in range(len(self._inbox))]
            closing = self._closed
        for job in jobs:
            job()
        if closing:
            self.abort("", everything=True)
        self._reap()
        if not self._paused and not closing:
            self._admit()
            self._step()
        return not closing

    def _abandon(self) -> None:
        """Let nobody wait for a thread that has ended; there is somebody only after a fault of our own."""
        lost = EngineUnavailable("the embedded engine has stopped")
        with self._changed:
            self._closed = True
            generations = list(self._in_flight.values())
            futures = [future for future, _ in self._inbox]
            self._in_flight.clear()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(lost)
        for generation in generations:
            generation.finish(failure(lost), self.weight_version)
            generation.on_progress()

    def _has_work(self) -> bool:
        if self._inbox or self._closed or any(g.cancelled for g in self._in_flight.values()):
            return True
        return not self._paused and bool(self._stepper.running or self._waiting)

    def _reap(self) -> None:
        """End what was cancelled; a generation that never began ends with no token."""
        running = self._stepper.running
        for i in reversed(range(len(running))):
            if running[i].generation.cancelled:
                self._end(self._stepper.drop(i, Generation.ABORTED), dict(Generation.ABORTED))
        with self._changed:
            gone = [row for row in self._waiting if row.generation.cancelled]
            for row in gone:
                self._waiting.remove(row)
        for row in gone:
            self._end(row, dict(Generation.ABORTED))

    def _retract(self) -> None:
        rows = self._stepper.clear()
        for row in rows:
            row.generation.num_retractions += 1
        with self._changed:
            self._waiting.extendleft(reversed(rows))

    def _admit(self) -> None:
        while self._waiting and len(self._stepper.running) < self.facts.max_batch:
            row = self._waiting.popleft()
            try:
                reason = self._stepper.begin(row)
            except Exception as error:  # the boundary: one bad prompt must not end the thread
                reason = failure(error)
            if reason is None:
                if row.generation.body.stream:
                    row.generation.on_progress()
            else:
                self._end(row, reason)

    def _step(self) -> None:
        if not self._stepper.running:
            return
        try:
            ended = self._stepper.step()
        except Exception as error:  # the boundary: the batch is lost, the engine is not
            ended = [(row, failure(error)) for row in self._stepper.clear()]
        for row, reason in ended:
            self._end(row, reason)

    def _end(self, row: Row, reason: dict[str, Any]) -> None:
        generation = row.generation
        with self._changed:
            self._in_flight.pop(generation.rid, None)
        generation.finish(reason, self.weight_version)
        generation.on_progress()


async def run_engine(
    model_dir: str | Path,
    *,
    ready: Callable[[str], None],
    stopped: Event,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    incremental_stream: bool = False,
    drain_s: float = 10.0,
) -> None:
    """Load a model and serve it until `stopped` is set; `ready` is called with the URL when it listens.

    Requests under way have `drain_s` seconds to end. Raises `ConfigError`; an address in use is an `OSError`.
    """
    engine = LocalEngine(model_dir, device=device, dtype=dtype)
    try:
        app = server.make_app(engine, incremental_stream=incremental_stream)
        async with server.serve(app, host, port, drain_s=drain_s) as url:
            ready(url)
            await stopped.wait()
    finally:
        engine.close()
