"""Agents that are commands, in processes of their own."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
from rolloutkit import Served, agent, until


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


async def until_gone(pid: int) -> None:
    await until(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("printed", "reward"),
    [
        ("0.5", 0.5),
        ("1", 1.0),
        ('{"reward": 0.25, "metadata": {"from": "agent"}}', 0.25),
        ("talk\n\n0.75\n\n", 0.75),
        ('{"reward": null}', None),
    ],
)
async def test_the_last_line_is_the_result(
    served: Served, tmp_path: Path, printed: str, reward: float | None
) -> None:
    script = agent(tmp_path, f"assert turn() == json.loads(os.environ['TOKENTAPE_TASK'])\nprint({printed!r})")
    (group,) = await served.all([sys.executable, str(script)], [{"question": "1 + 1"}], group_size=2)
    assert group.failures == ()
    assert group.rewards == [reward, reward]
    await served.check([group])
    if "from" in printed:
        assert (await served.sessions())[0]["metadata"]["from"] == "agent"


async def test_a_command_is_told_where_to_talk(served: Served, tmp_path: Path) -> None:
    code = (
        "turn()\n"
        "names = ['ANTHROPIC_BASE_URL', 'ANTHROPIC_API_KEY', 'TOKENTAPE_SESSION_ID', 'TOKENTAPE_GROUP_ID',\n"
        "         'TOKENTAPE_MEMBER', 'TOKENTAPE_ATTEMPT']\n"
        "said = {name: os.environ[name] for name in names} | {'argv': sys.argv[1:]}\n"
        "print(json.dumps({'reward': 1, 'metadata': said}))"
    )
    words = [sys.executable, str(agent(tmp_path, code)), "--url={base_url}", "{model}", "{session_id}", "{x}"]
    (group,) = await served.all(words, ["t"], model="tiny")
    (session,) = await served.sessions()
    said, (session_id,) = session["metadata"], group.session_ids
    assert said["argv"] == [f"--url={said['ANTHROPIC_BASE_URL']}", "tiny", session_id, "{x}"]
    assert said["ANTHROPIC_BASE_URL"].endswith(f"/sessions/{session_id}/v1")
    assert (said["TOKENTAPE_SESSION_ID"], said["TOKENTAPE_GROUP_ID"]) == (session_id, group.group_id)
    assert (said["TOKENTAPE_MEMBER"], said["TOKENTAPE_ATTEMPT"]) == ("0", "1")


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("turn(); print(1); sys.exit(3)", "episode_failed", "ended with 3"),
        ("turn(); sys.exit('no such tool')", "episode_failed", "no such tool"),
        ("turn(); os.kill(os.getpid(), 9)", "episode_failed", "ended with -9"),
        ("turn()", "episode_result_wrong", "''"),
        ("turn(); print('done')", "episode_result_wrong", "'done'"),
        ('turn(); print(\'{"reward": 1, "rewrad": 2}\')', "episode_result_wrong", "rewrad"),
        ("turn(); print('true')", "episode_result_wrong", "'true'"),
        ("print(1)", "episode_empty", "no turn"),
    ],
)
async def test_a_command_that_fails(served: Served, tmp_path: Path, code: str, kind: str, said: str) -> None:
    (group,) = await served.all([sys.executable, str(agent(tmp_path, code))], ["t"], retries=0)
    assert [failure.kind for failure in group.failures] == [kind]
    assert said in group.failures[0].message
    await served.check([])


async def test_a_command_that_is_not_there(served: Served) -> None:
    (group,) = await served.all(["/no/such/agent"], ["t"], retries=0)
    assert "does not start" in group.failures[0].message


async def test_a_long_task_comes_by_stdin(served: Served, tmp_path: Path) -> None:
    script = agent(tmp_path, "assert 'TOKENTAPE_TASK' not in os.environ\nprint(len(turn()['long']))")
    fields: Any = {"long": "hello " * 50_000}
    served.fake.context_length = 10**7
    (group,) = await served.all([sys.executable, str(script)], [fields], retries=0)
    assert group.rewards == [300_000.0]


HANGING = (
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "with open({pids!r}, 'w') as file: print(os.getpid(), child.pid, file=file)\n"
    "turn()\n"
)


async def test_at_the_deadline_a_command_ends_with_its_children(served: Served, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = agent(tmp_path, HANGING.format(pids=str(pids)) + "time.sleep(60)")
    (group,) = await served.all([sys.executable, str(script)], ["t"], deadline_s=3, retries=0)
    assert [failure.kind for failure in group.failures] == ["episode_timeout"]
    for pid in map(int, pids.read_text().split()):
        await until_gone(pid)
    await served.check([])


async def test_a_command_that_ignores_being_stopped_is_killed(served: Served, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANGING.format(pids=str(pids))
    script = agent(tmp_path, code + "time.sleep(60)")
    (group,) = await served.all([sys.executable, str(script)], ["t"], deadline_s=3, retries=0)
    assert [failure.kind for failure in group.failures] == ["episode_timeout"]
    for pid in map(int, pids.read_text().split()):
        await until_gone(pid)


async def test_a_command_may_clean_up(served: Served, tmp_path: Path) -> None:
    code = (
        "import signal\n"
        "def clean(*_): open('cleaned', 'w').close(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, clean)\n"
        "os.chdir(os.path.dirname(os.path.abspath(__file__)))\n"
        "turn(); time.sleep(60)"
    )
    await served.all([sys.executable, str(agent(tmp_path, code))], ["t"], deadline_s=3, retries=0)
    assert (tmp_path / "cleaned").exists()


async def test_what_a_command_leaves_behind_ends_with_it(served: Served, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = agent(tmp_path, HANGING.format(pids=str(pids)) + "print(1)")
    (group,) = await served.all([sys.executable, str(script)], ["t"])
    assert group.complete
    for pid in map(int, pids.read_text().split()):
        await until_gone(pid)


async def test_cancelling_ends_commands(served: Served, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = agent(tmp_path, HANGING.format(pids=str(pids)) + "time.sleep(60)")
    async with served.rollouts([sys.executable, str(script)], ["t"]):
        await until(lambda: pids.exists() and pids.read_text().strip())
        assert all(alive(pid) for pid in map(int, pids.read_text().split()))
    for pid in map(int, pids.read_text().split()):
        await until_gone(pid)
    await served.check([])
