"""What the model says to each agent: calls of the agent's own tools, then an answer."""

from collections.abc import Callable
from functools import partial
from typing import Any

from agentkit import Place, Says


def adds_and_reads(place: Place, *, last: str = "") -> list[Says]:
    """One call, two parallel calls, an answer; `last` names the tool that takes it, where there is one."""
    answer = f"The sum is 42, and the note holds {place.secret}."
    end = (
        Says("", [(last, {"answer": answer})])
        if last
        else Says(answer, reasoning="I have the tool's results.")
    )
    return [
        Says("Hello, I add.", [("add", {"a": 20, "b": 22})], reasoning="The user wants the sum."),
        Says(
            "", [("read_file", {"path": "note.txt"}), ("add", {"a": 1, "b": 2})], reasoning="Now the world."
        ),
        end,
    ]


def writes_code(place: Place) -> list[Says]:
    """What a CodeAgent's model says: Python between <code> tags."""
    return [
        Says("Thought: I add the two.\n<code>\nprint(add(a=20, b=22))\n</code>"),
        Says("Thought: I read the note.\n<code>\nprint(read_file(path='note.txt'))\n</code>"),
        Says(f"Thought: I say hello to the world.\n<code>\nfinal_answer('It holds {place.secret}')\n</code>"),
    ]


def coding_script(
    place: Place,
    *,
    shell: Callable[[str], tuple[str, dict[str, Any]]],
    read: Callable[[str], tuple[str, dict[str, Any]]],
):
    return [
        Says(
            "Hello, I copy the note.",
            [shell("cp note.txt answer.txt && ls")],
            reasoning="The user wants a copy.",
        ),
        Says(
            "", [read(str(place.task / "answer.txt")), shell("wc -c answer.txt")], reasoning="Now the world."
        ),
        Says(f"It holds {place.secret}.", reasoning="I have the tool's results."),
    ]


def of_cli(
    shell: str, read: str, *, command: str = "command", path: str = "path", **more: object
) -> Callable[[Place], list[Says]]:
    """The script in the words of a CLI: the names of its tools, and of their arguments."""

    def in_shell(line: str) -> tuple[str, dict[str, Any]]:
        return shell, {command: line, **more}

    def reading(file: str) -> tuple[str, dict[str, Any]]:
        return (read, {path: file}) if read else in_shell(f"cat {file}")

    return partial(coding_script, shell=in_shell, read=reading)


QWEN = of_cli("run_shell_command", "read_file", path="file_path", is_background=False)
OPENCODE = of_cli("bash", "read", path="filePath", description="run it")
PI = of_cli("bash", "read")
CLAUDE = of_cli("Bash", "Read", path="file_path", description="run it")
CODEX = of_cli("exec_command", "", command="cmd")


def then_again(script: Callable[[Place], list[Says]], place: Place) -> list[Says]:
    """A second question follows. Without reasoning: the template drops it from what a user has answered."""
    said = [Says(says.text or "hello world", says.calls) for says in script(place)]
    return [*said, Says("hello user, hello world.")]


def mini_script(place: Place) -> list[Says]:
    """mini-swe-agent has one tool, and ends by a command."""
    script = of_cli("bash", "")(place)
    return [
        *script[:-1],
        Says("I am done.", [("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})]),
    ]


def claude_with_subagent(place: Place) -> list[Says]:
    """Like the script of a CLI, with a sub-agent between."""
    asks = {
        "description": "Say hello",
        "prompt": "Say hello to the world.",
        "subagent_type": "general-purpose",
    }
    first, *rest = CLAUDE(place)
    return [first, Says("I ask another.", [("Agent", asks)], reasoning="The user wants help."), *rest]


def codex_patches(place: Place) -> list[Says]:
    """With the tool of free text that Codex offers to models it knows."""
    patch = "*** Begin Patch\n*** Add File: patched.txt\n+hello world\n*** End Patch\n"
    first, _, end = CODEX(place)
    look = ("exec_command", {"cmd": "cat answer.txt"})
    return [
        first,
        Says("", [("apply_patch", {"input": patch}), look], reasoning="Now the world."),
        Says("", [("exec_command", {"cmd": "grep hello patched.txt"})]),
        end,
    ]


def claude_compacts(place: Place) -> list[Says]:
    """`/compact`, then a question: the new history begins with the summary."""
    summary = "The note was copied, it was read back, and hello world was said to the user."
    *said, end = then_again(CLAUDE, place)
    compaction = f"<analysis>\nI look back.\n</analysis>\n\n<summary>\n{summary}\n</summary>"
    return [*said, Says(compaction, label="compaction"), end]


def codex_compacts(place: Place) -> list[Says]:
    """A long output fills the window: Codex asks, without tools, for a summary, and goes on from it."""
    first, _, end, _ = then_again(CODEX, place)
    long = ("exec_command", {"cmd": "head -c 30000 /dev/zero | tr '\\0' x"})
    look = ("exec_command", {"cmd": "cat answer.txt"})
    return [first, Says("hello", [long]), Says("hello world", [look]), end]
