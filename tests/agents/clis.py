"""Coding agents: how each is started and configured without a terminal, and its script in its own tools."""

import json
from collections.abc import Callable
from functools import partial

import scripts
from agentkit import Case, Place, program

AGAIN = "Say hello again."
CODING_TASK = "Copy note.txt to answer.txt with a shell command, read answer.txt back, and say what it holds."


def binary(name: str) -> str:
    return program("node", "node_modules", ".bin", name)


def going_on(command: Callable[..., list[str]], *words: str) -> Callable[[Place], list[str]]:
    """A second command, which goes on with the session that the first one saved."""
    return lambda place: command(place, *words)


def mini(place: Place) -> list[str]:
    overrides = [
        "mini.yaml",
        f"model.model_kwargs.api_base={place.base_url}",
        "model.cost_tracking=ignore_errors",
    ]
    return [
        *(program("requirements-older", "bin", "mini"), "--yolo", "--exit-immediately"),
        *("-m", "openai/policy", "-t", CODING_TASK, "-o", str(place.home / "trajectory.json")),
        *(word for override in overrides for word in ("-c", override)),
    ]


def mini_environment(place: Place) -> dict[str, str]:
    return {
        "OPENAI_API_KEY": "not-needed",
        "MSWEA_CONFIGURED": "true",
        "MSWEA_GLOBAL_CONFIG_DIR": str(place.home),
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    }


def qwen(_place: Place, *words: str) -> list[str]:
    switches = ("--auth-type", "openai", "--approval-mode", "yolo")
    return [binary("qwen"), *switches, *(words or ("-p", CODING_TASK))]


def qwen_environment(place: Place) -> dict[str, str]:
    return {"OPENAI_BASE_URL": place.base_url, "OPENAI_API_KEY": "not-needed", "OPENAI_MODEL": "policy"}


def qwen_setup(place: Place) -> None:
    settings = {
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"enableAutoUpdate": False},
        "telemetry": {"enabled": False},
    }
    (place.home / ".qwen").mkdir()
    (place.home / ".qwen/settings.json").write_text(json.dumps(settings))


def opencode(_place: Place, *words: str) -> list[str]:
    return [binary("opencode"), "run", *(words or (CODING_TASK,))]


def opencode_environment(place: Place) -> dict[str, str]:
    switches = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD")
    return {
        "XDG_CONFIG_HOME": str(place.home / ".config"),
        **{f"OPENCODE_DISABLE_{switch}": "1" for switch in switches},
    }


def opencode_setup(place: Place, *, sdk: str = "@ai-sdk/openai-compatible") -> None:
    model = {"name": "policy", "limit": {"context": 1_000_000, "output": 8192}}
    provider = {
        "npm": sdk,
        "name": "tokentape",
        "options": {"baseURL": place.base_url, "apiKey": "not-needed"},
        "models": {"policy": model},
    }
    config = {
        "autoupdate": False,
        "share": "disabled",
        "model": "tokentape/policy",
        "small_model": "tokentape/policy",
        "permission": {"*": "allow"},
        "provider": {"tokentape": provider},
    }
    directory = place.home / ".config/opencode"
    directory.mkdir(parents=True)
    (directory / "opencode.json").write_text(json.dumps(config))


def pi(_place: Place, *words: str) -> list[str]:
    start = [binary("pi"), "--offline", "--provider", "tokentape", "--model", "policy"]
    return [*start, *(words or ("-p", CODING_TASK))]


def pi_setup(place: Place, *, api: str) -> None:
    provider = {
        "baseUrl": place.root_url if api == "anthropic-messages" else place.base_url,
        "apiKey": "not-needed",
        "api": api,
        "models": [{"id": "policy", "contextWindow": 1_000_000, "maxTokens": 8192}],
    }
    directory = place.home / ".pi/agent"
    directory.mkdir(parents=True)
    (directory / "models.json").write_text(json.dumps({"providers": {"tokentape": provider}}))


def claude(_place: Place, *words: str) -> list[str]:
    return [binary("claude"), "--allowedTools", "Bash Read Write Agent", *(words or ("-p", CODING_TASK))]


def claude_environment(place: Place) -> dict[str, str]:
    switches = (
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
        "DISABLE_AUTOUPDATER",
        "DISABLE_TELEMETRY",
        "IS_SANDBOX",
    )
    return {
        "ANTHROPIC_BASE_URL": place.root_url,
        "ANTHROPIC_API_KEY": "not-needed",
        "ANTHROPIC_MODEL": "policy",
        **dict.fromkeys(switches, "1"),
    }


def codex(_place: Place, *words: str) -> list[str]:
    switches = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    return [binary("codex"), "exec", *switches, *(words or (CODING_TASK,))]


def codex_environment(place: Place) -> dict[str, str]:
    return {"CODEX_HOME": str(place.home / ".codex"), "TOKENTAPE_API_KEY": "not-needed"}


def codex_setup(place: Place, *, model: str = "policy", features: str = "", limit: int = 1_000_000) -> None:
    """web_search is run by OpenAI itself: no gateway can offer it."""
    directory = place.home / ".codex"
    directory.mkdir()
    (directory / "config.toml").write_text(
        f'model = "{model}"\n'
        'model_provider = "tokentape"\n'
        "model_context_window = 1000000\n"
        f"model_auto_compact_token_limit = {limit}\n"
        "check_for_update_on_startup = false\n"
        'web_search = "disabled"\n'
        "[model_providers.tokentape]\n"
        'name = "tokentape"\n'
        f'base_url = "{place.base_url}"\n'
        'env_key = "TOKENTAPE_API_KEY"\n'
        'wire_api = "responses"\n'
        "[analytics]\n"
        "enabled = false\n"
        "[features]\n"
        f"{features}\n"
    )


QWEN = partial(
    Case,
    package="@qwen-code/qwen-code",
    protocol="chat",
    command=qwen,
    environment=qwen_environment,
    setup=qwen_setup,
    writes=True,
)
OPENCODE = partial(
    Case,
    package="opencode-ai",
    command=opencode,
    script=scripts.OPENCODE,
    environment=opencode_environment,
    setup=opencode_setup,
    writes=True,
)
PI = partial(Case, "pi", "@mariozechner/pi-coding-agent", command=pi, script=scripts.PI, writes=True)
CLAUDE = partial(
    Case,
    package="@anthropic-ai/claude-code",
    protocol="messages",
    command=claude,
    environment=claude_environment,
    writes=True,
)
CODEX = partial(
    Case,
    package="@openai/codex",
    protocol="responses",
    command=codex,
    environment=codex_environment,
    setup=codex_setup,
    writes=True,
)

CLIS = [
    Case(
        *("mini-swe-agent", "mini-swe-agent", "chat", mini, scripts.mini_script, mini_environment),
        writes=True,
    ),
    QWEN("Qwen Code", script=scripts.QWEN),
    QWEN(
        "Qwen Code, resumed",
        script=partial(scripts.then_again, scripts.QWEN),
        later=[going_on(qwen, "--continue", "-p", AGAIN)],
        why_not="its first message lists the folder, which has changed since",
    ),
    OPENCODE("OpenCode", protocol="chat"),
    OPENCODE(
        "OpenCode, resumed",
        protocol="chat",
        script=partial(scripts.then_again, scripts.OPENCODE),
        later=[going_on(opencode, "--continue", AGAIN)],
    ),
    OPENCODE("OpenCode", protocol="messages", setup=partial(opencode_setup, sdk="@ai-sdk/anthropic")),
    OPENCODE("OpenCode", protocol="responses", setup=partial(opencode_setup, sdk="@ai-sdk/openai")),
    PI(protocol="chat", setup=partial(pi_setup, api="openai-completions")),
    PI(protocol="messages", setup=partial(pi_setup, api="anthropic-messages")),
    PI(protocol="responses", setup=partial(pi_setup, api="openai-responses")),
    CLAUDE("Claude Code", script=scripts.CLAUDE),
    CLAUDE("Claude Code, with a sub-agent", script=scripts.claude_with_subagent),
    CLAUDE(
        "Claude Code, resumed",
        script=partial(scripts.then_again, scripts.CLAUDE),
        later=[going_on(claude, "--continue", "-p", AGAIN)],
    ),
    CLAUDE(
        "Claude Code, compacted",
        script=scripts.claude_compacts,
        later=[going_on(claude, "--continue", "-p", "/compact"), going_on(claude, "--continue", "-p", AGAIN)],
        why_not="a summary replaces the history",
    ),
    CODEX("Codex", script=scripts.CODEX),
    CODEX(
        "Codex, with `apply_patch`",
        script=scripts.codex_patches,
        setup=partial(codex_setup, model="gpt-5.5", features="multi_agent = false"),  # else: tool_search
    ),
    CODEX(
        "Codex, resumed",
        script=partial(scripts.then_again, scripts.CODEX),
        later=[going_on(codex, "resume", "--last", AGAIN)],
    ),
    CODEX(
        "Codex, compacted",
        script=scripts.codex_compacts,
        setup=partial(codex_setup, limit=40_000),
        why_not="a summary replaces the history",
    ),
]
