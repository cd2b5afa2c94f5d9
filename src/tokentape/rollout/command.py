"""An agent that is a command: a process group of its own, told where to talk by its environment."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import msgspec

from tokentape.errors import EpisodeFailed, EpisodeResultWrong
from tokentape.rollout.records import Episode, Result

_TERM_S = 2.0
_STDOUT_TAIL, _STDERR_TAIL = 1 << 20, 2000
_LONGEST_VARIABLE = 100_000  # bytes; Linux takes 128 KiB for one


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    """The last line of a command's output, where it is an object."""

    reward: float | None
    metadata: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    turn_rewards: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    branch_rewards: dict[str, float] = msgspec.field(default_factory=dict[str, float])


async def run_command(template: Sequence[str], episode: Episode) -> Result:
    """Run a command for an episode, and read its result from the last line that it prints.

    Its stdin is the task as JSON. Whatever it has started in its process group ends with it: at its own end,
    at the deadline, or when we are cancelled (SIGTERM, then SIGKILL).

    Raises:
        EpisodeFailed: it does not start, or does not exit with 0.
        EpisodeResultWrong: its last line is neither a number nor an object with `reward`.
    """
    task = msgspec.json.encode(episode.task)
    values = {
        "{base_url}": episode.base_url,
        "{api_key}": episode.api_key,
        "{model}": episode.model,
        "{session_id}": episode.session_id,
    }
    command = [_filled(part, values) for part in template]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(task)
        stdin.seek(0)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=stdin,
                stdout=out,
                stderr=err,
                env={**os.environ, **_environment(episode, task)},
                start_new_session=True,
            )
        except OSError as error:
            raise EpisodeFailed(f"{command[0]} does not start: {error}") from error
        try:
            code = await process.wait()
        finally:
            await _end(process)
        if code:
            said = _tail(err, _STDERR_TAIL).decode(errors="replace").strip()
            raise EpisodeFailed(f"{command[0]} ended with {code}: {said}")
        return _read_result(_tail(out, _STDOUT_TAIL))


def _filled(part: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(name, value)
    return part


def _environment(episode: Episode, task: bytes) -> dict[str, str]:
    variables = {
        "OPENAI_BASE_URL": episode.base_url,
        "OPENAI_API_KEY": episode.api_key,
        "ANTHROPIC_BASE_URL": episode.base_url,
        "ANTHROPIC_API_KEY": episode.api_key,
        "TOKENTAPE_MODEL": episode.model,
        "TOKENTAPE_SESSION_ID": episode.session_id,
        "TOKENTAPE_GROUP_ID": episode.group_id,
        "TOKENTAPE_MEMBER": str(episode.member),
        "TOKENTAPE_ATTEMPT": str(episode.attempt),
    }
    return variables if len(task) > _LONGEST_VARIABLE else {**variables, "TOKENTAPE_TASK": task.decode()}


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the command and all that it started in its group."""
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(process.wait(), _TERM_S)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _tail(file: IO[bytes], num_bytes: int) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
    return file.read()


def _read_result(stdout: bytes) -> Result:
    lines = stdout.split(b"\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), b"")
    try:
        said = msgspec.json.decode(last, type=float | _Said)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        shown = last[:200].decode(errors="replace")
        raise EpisodeResultWrong(
            f"the last line of a command's output is its reward, or an object with `reward`; this one is "
            f"{shown!r} ({error})"
        ) from None
    if isinstance(said, float):
        return Result(said)
    return Result(said.reward, said.metadata, said.turn_rewards, said.branch_rewards)
