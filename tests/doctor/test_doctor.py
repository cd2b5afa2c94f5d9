"""`tokentape doctor`: every check says ok where all is well, and finds what is not; nothing is changed."""

import json
import shutil
import socket
import sqlite3
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from postgres import postgres

from routerkit import routing
from tokentape.cli import main
from tokentape.doctor import Check, Status
from tokentape.doctor.checks import Checks, is_well
from tokentape.doctor.engine import check_engine
from tokentape.doctor.machine import _EXTRAS, Requirement, check_machine, check_packages, parse, satisfies
from tokentape.doctor.model import Model, check_model
from tokentape.doctor.same import other_directory
from tokentape.doctor.show import table
from tokentape.doctor.sqlite import check_sqlite
from tokentape.errors import ConfigError
from tokentape.model import TINY_MODEL
from tokentape.store import SessionRecord, SQLiteStore
from tokentape.stores import open_store
from tokentape.testing import FakeSGLang, Fault, byte_level_tokenizer, write_model_dir

OK, WARNING, WRONG = Status.OK, Status.WARNING, Status.WRONG


def by_name(checks: list[Check]) -> dict[str, Check]:
    for check in checks:
        assert (check.advice is None) == (check.status is OK), check  # what is not well says what to change
    return {check.name: check for check in checks}


def statuses(checks: list[Check]) -> dict[str, Status]:
    return {name: check.status for name, check in by_name(checks).items()}


def not_ok(checks: list[Check]) -> dict[str, Status]:
    return {name: status for name, status in statuses(checks).items() if status is not OK}


# -- the machine


def test_the_machine() -> None:
    found = by_name(check_machine("127.0.0.1", 0))
    assert found["python"].status is OK
    assert found["packages"].status is OK
    assert "aiohttp" in found["packages"].found


def test_packages() -> None:
    lines = ["aiohttp>=3.14", 'torch>=2.6; extra == "local"', 'tokentape[local]; extra == "demo"']
    lines += ['psycopg[binary,pool]>=3.2; extra == "postgres"', 'letta<0.17,>=0.16.7 ; extra == "letta"']
    needed = parse(lines)
    assert [(one.name, one.bounds, one.extra) for one in needed] == [
        ("aiohttp", ">=3.14", None),
        ("torch", ">=2.6", "local"),
        ("psycopg", ">=3.2", "postgres"),
        ("letta", "<0.17,>=0.16.7", "letta"),
    ]
    for have, expected in (
        ({"aiohttp": "3.14.0"}, {}),
        ({"aiohttp": "3.9.5"}, {"packages": WRONG}),
        ({}, {"packages": WRONG}),
        ({"aiohttp": "4.0", "torch": "2.5.1+cpu"}, {"extra local": WARNING}),
        ({"aiohttp": "4.0", "letta": "0.17.0"}, {"extra letta": WARNING}),
        ({"aiohttp": "4.0", "letta": "0.16.10", "torch": "2.10", "psycopg": "3.2"}, {}),
    ):
        checks = Checks("machine")
        check_packages(checks, needed, have)
        assert not_ok(checks.found) == expected, have
    assert satisfies("2.10", ">=2.9")
    assert not satisfies("2.9.9", ">=2.10")
    checks = Checks("machine")
    check_packages(checks, [Requirement("Some_Package", ">=1", None)], {"some-package": "1.0"})
    assert not_ok(checks.found) == {}


def test_every_extra_says_what_it_is_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(_EXTRAS)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert statuses(check_machine("127.0.0.1", port))["port"] is WARNING
    assert statuses(check_machine("127.0.0.1", port))["port"] is OK
    assert statuses(check_machine("192.0.2.1", 0))["port"] is WRONG
    for host in ("no.such.host.invalid", "a..b"):
        assert statuses(check_machine(host, 0))["port"] is WRONG


def test_little_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable:   200000 kB\n")
    assert statuses(check_machine("127.0.0.1", 0, tmp_path / "meminfo"))["memory"] is WARNING
    assert statuses(check_machine("127.0.0.1", 0, tmp_path / "no"))["memory"] is OK


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    found = by_name(check_machine("127.0.0.1", 0))["open files"]
    assert found.status is WARNING
    assert found.advice is not None
    assert "at most 1,024" in found.advice


# -- the model


def test_a_good_model() -> None:
    model, checks = check_model(str(TINY_MODEL))
    assert not_ok(checks) == {}
    assert model is not None
    assert (model.vocab_size, model.sizes.context_length) == (1024, 4096)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copytree(TINY_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def changed(path: Path, **values: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**config, **values}.items() if v is not None}))


def test_models_that_are_not(directory: Path, tmp_path: Path) -> None:
    for name in ("no/such", str(tmp_path / "nothing"), "../x"):
        model, checks = check_model(name)
        assert (model, statuses(checks)) == (None, {"directory": WRONG})
    config = (directory / "config.json").read_text()
    for text, expected in (
        ('{"vocab_size": 300, "eos_token_id": 1017}', {"configuration": WARNING, "tokenizer": WRONG}),
        ("{", {"configuration": WRONG}),
    ):
        (directory / "config.json").write_text(text)
        found = not_ok(check_model(str(directory))[1])
        assert {name: found.get(name) for name in expected} == expected
    (directory / "config.json").write_text(config)
    template = next(directory.glob("*.jinja"))
    source = template.read_text()
    template.write_text("{% if %}")
    assert not_ok(check_model(str(directory))[1]) == {"template": WRONG}
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    found = not_ok(check_model(str(directory))[1])
    assert (found["format"], found["exact extension"]) == (WARNING, WARNING)
    template.write_text(source)
    (directory / "tokenizer.json").unlink()
    assert not_ok(check_model(str(directory))[1]) == {"tokenizer": WRONG}


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("config.json", "[]", "configuration"),
        ("config.json", '{"text_config": [1]}', "configuration"),
        ("config.json", '{"vocab_size": "300"}', "configuration"),
        ("config.json", '{"vocab_size": 1024, "max_position_embeddings": [1]}', "configuration"),
        ("generation_config.json", "null", "configuration"),
        ("generation_config.json", '{"eos_token_id": 99999}', "end of turn"),
        ("generation_config.json", '{"eos_token_id": [-1]}', "end of turn"),
        ("tokenizer_config.json", "[]", "template"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "tokenizer"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "prompt"),
        ("chat_template.jinja", "{{ messages.x.y }}", "prompt"),
    ],
)
def test_files_that_are_not_what_they_should_be(directory: Path, name: str, text: str, wrong: str) -> None:
    (directory / name).write_text(text)
    args = ["doctor", "--model", str(directory), "--port", "0"]
    done = CliRunner().invoke(main, [*args, "--json"])
    assert done.exit_code == 1, done.output
    statuses = {check["name"]: check["status"] for check in json.loads(done.output)["checks"]}
    assert [name for name, status in statuses.items() if status == "wrong"] == [wrong]
    done = CliRunner().invoke(main, args)
    assert (done.exit_code, "1 wrong" in done.output) == (1, True)


def test_no_end_of_turn(directory: Path) -> None:
    changed(directory / "config.json", eos_token_id=None)
    changed(directory / "tokenizer_config.json", eos_token=None)
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "special_tokens_map.json").unlink(missing_ok=True)
    assert not_ok(check_model(str(directory))[1])["end of turn"] is WRONG


# -- the engine


@pytest.fixture
def model(tmp_path: Path) -> Model:
    found, checks = check_model(str(_model_dir(tmp_path)))
    assert found is not None, checks
    return found


def _model_dir(tmp_path: Path) -> Path:
    write_model_dir(tmp_path / "fake")
    return tmp_path / "fake"


async def test_a_good_engine(model: Model) -> None:
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        checks = await check_engine(fake.url, model)
        assert not_ok(checks) == {}, checks
        found = by_name(checks)
        assert "one server" in found["reachable"].found
        assert "0.5.23" in found["version"].found
        assert "4 tokens sampled" in found["log-probabilities"].found
        assert found["tokenizer"].found == "makes the same ids of the same texts"
        assert len(fake.requests) == 1


async def test_an_engine_without_a_model() -> None:
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        assert not_ok(await check_engine(fake.url, None)) == {"log-probabilities": WARNING}
        assert fake.requests == []


async def test_engines_that_are_not(model: Model) -> None:
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        url = fake.url
    assert statuses(await check_engine(url, model)) == {"reachable": WRONG}
    for bad in ("localhost:30000", "http://[::1", "http://h:99999"):
        assert statuses(await check_engine(bad, model)) == {"reachable": WRONG}
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        assert statuses(await check_engine(f"{fake.url}/v1", model)) == {"reachable": WRONG}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("missing", field="meta_info.output_token_logprobs"),
        Fault("status", status=500),
        Fault("disconnect"),
        Fault("not_json"),
    ],
)
async def test_no_log_probabilities(fault: Fault, model: Model) -> None:
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        fake.script(fault)
        assert not_ok(await check_engine(fake.url, model)) == {"log-probabilities": WRONG}


async def test_another_tokenizer(model: Model) -> None:
    other = byte_level_tokenizer(special=("<a>", "<b>", "<c>"), added=())
    other.add_tokens(["Hello, world!"])  # pyright: ignore[reportUnknownMemberType]
    async with FakeSGLang(other, vocab_size=1000) as fake:
        found = not_ok(await check_engine(fake.url, model))
        assert found == {"tokenizer": WRONG, "log-probabilities": WARNING}
        assert fake.requests == []  # it may not know the ids


async def test_a_model_with_more_tokens(model: Model) -> None:
    """All texts make the same ids, until somebody writes the last token."""
    older = byte_level_tokenizer(added=())
    assert older.get_vocab_size() < model.vocab_size
    async with FakeSGLang(older) as fake:
        assert statuses(await check_engine(fake.url, model))["tokenizer"] is WRONG
        assert fake.requests == []
        assert fake.alive


def test_a_directory_saved_again_is_the_same_model(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    assert path.read_bytes() != (TINY_MODEL / "tokenizer.json").read_bytes()
    assert other_directory(directory, TINY_MODEL) is None
    spec = json.loads(path.read_text())
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m).replace(" ", "") != last]
    del spec["model"]["vocab"][last]
    path.write_text(json.dumps(spec))
    assert other_directory(directory, TINY_MODEL) == f"{directory} has another tokenizer.json"


async def test_a_bos_is_no_other_tokenizer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeSGLang(byte_level_tokenizer()) as fake:
        from tokentape.engines.sglang import SGLangEngine

        asked = SGLangEngine.tokenize

        async def with_bos(self: SGLangEngine, text: str) -> list[int] | None:
            said = await asked(self, text)
            assert said is not None
            return [1, *said]

        monkeypatch.setattr(SGLangEngine, "tokenize", with_bos)
        assert not_ok(await check_engine(fake.url, model)) == {}


async def test_contexts_and_defaults(model: Model) -> None:
    async with FakeSGLang(byte_level_tokenizer(), context_length=10**6) as fake:
        fake.preferred_sampling_params = {"temperature": 0.2}
        found = not_ok(await check_engine(fake.url, model))
        assert found == {"context": WARNING, "sampling defaults": WARNING}


async def test_a_router_whose_servers_differ(model: Model) -> None:
    async with FakeSGLang(byte_level_tokenizer()) as one, FakeSGLang(byte_level_tokenizer()) as other:
        other.weight_version = "new"
        async with routing([one.url, other.url]) as router:
            found = by_name(await check_engine(router.url, model))
            assert found["reachable"].found == "a router"
            assert found["weights"].status is WRONG


# -- a store in a file


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files with their times and bytes; -shm is the readers' own memory, its name alone counts."""
    return {
        str(path): (0, b"")
        if path.name.endswith("-shm")
        else (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def unchanged(tmp_path: Path) -> Path:
    """A folder of its own."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def looked_at(path: Path, fingerprint: str | None = None) -> list[Check]:
    before = snapshot(path.parent)
    checks = check_sqlite(path, fingerprint)
    assert snapshot(path.parent) == before  # whatever it found
    return checks


def test_a_store_that_is_not_there(unchanged: Path) -> None:
    checks = looked_at(unchanged / "s.sqlite")
    assert not_ok(checks) in ({}, {"file system": WARNING}), checks
    assert list(unchanged.iterdir()) == []
    assert not_ok(check_sqlite(unchanged / "no" / "s.sqlite", None)) == {"folder": WRONG}
    assert not (unchanged / "no").exists()


async def test_a_store_in_use_and_after(unchanged: Path) -> None:
    path = unchanged / "s.sqlite"
    store = SQLiteStore(path, exclusive=True, tokenizer="f" * 64)
    await store.put_session(SessionRecord("s1", "open", 0.0))
    found = by_name(looked_at(path, "f" * 64))
    assert found["lock"].status is WARNING
    assert "1 sessions" in found["file"].found  # it is only in the log yet
    assert found["tokenizer"].found == "the model's"
    await store.aclose()
    for mode in ("closed", "copied without its log"):
        if mode != "closed":
            for end in ("-wal", "-shm"):
                (unchanged / f"s.sqlite{end}").unlink(missing_ok=True)
        found = by_name(looked_at(path, "f" * 64))
        assert (found["lock"].status, found["file"].status) == (OK, OK)
        assert "1 sessions" in found["file"].found
    store = SQLiteStore(path, exclusive=True, tokenizer="f" * 64)  # looking has not spoilt it
    assert await store.load("s1") is not None
    await store.aclose()


async def test_stores_that_cannot_be_used(unchanged: Path) -> None:
    path = unchanged / "s.sqlite"
    await SQLiteStore(path, tokenizer="f" * 64).aclose()
    assert not_ok(looked_at(path, "0" * 64)).get("tokenizer") is WRONG
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    assert not_ok(looked_at(path)).get("schema") is WRONG
    with pytest.raises(ConfigError):  # the gateway agrees
        SQLiteStore(path)
    path.write_bytes(b"not a database, but long enough to be one" * 100)
    for end in ("-wal", "-shm"):
        (unchanged / f"s.sqlite{end}").unlink(missing_ok=True)
    assert not_ok(looked_at(path)).get("file") is WRONG
    assert not_ok(looked_at(unchanged)).get("file") is WRONG
    other = unchanged / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    assert not_ok(looked_at(other)).get("file") is WRONG


def test_disks(unchanged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    for kind, expected in (("nfs4", WRONG), ("tmpfs", WARNING), ("ext4", OK)):
        mounts.write_text(f"/dev/a / xfs rw 0 0\nserver:/x {unchanged} {kind} rw 0 0\n")
        assert statuses(check_sqlite(unchanged / "s", None, mounts))["file system"] is expected
    usage = shutil.disk_usage(unchanged)
    for free, expected in ((2**20, WRONG), (2**29, WARNING), (2**31, OK)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage._replace(free=free))
        assert statuses(check_sqlite(unchanged / "s", None, mounts))["disk"] is expected
    monkeypatch.setattr("os.access", lambda *_: False)
    assert statuses(check_sqlite(unchanged / "s", None, mounts))["folder"] is WRONG


# -- a store in PostgreSQL


def tables_of(dsn: str) -> list[Any]:
    import psycopg

    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT relname FROM pg_class WHERE relkind = 'r' ORDER BY 1").fetchall()


async def test_a_database(database: str) -> None:
    from tokentape.doctor.postgres import check_postgres

    before = tables_of(database)
    assert not_ok(check_postgres(database, "f" * 64)) == {}
    assert tables_of(database) == before
    await open_store(database, tokenizer="f" * 64).aclose()
    checks = check_postgres(database, "f" * 64)
    assert not_ok(checks) == {}
    assert by_name(checks)["tokenizer"].found == "the model's"
    assert not_ok(check_postgres(database, "0" * 64)) == {"tokenizer": WRONG}
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE tokentape SET value = '99' WHERE name = 'schema'")
    assert not_ok(check_postgres(database, None)) == {"schema": WRONG}


async def test_a_user_without_rights(database: str) -> None:
    import psycopg

    from tokentape.doctor.postgres import check_postgres

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        connection.execute("DROP ROLE IF EXISTS weak")
        connection.execute("CREATE ROLE weak LOGIN")
        weak = database.replace("tokentape@", "weak@")
        assert not_ok(check_postgres(weak, None)) == {"rights": WRONG}
        await open_store(database).aclose()
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO weak")
        assert not_ok(check_postgres(weak, None)) == {"rights": WRONG}
        connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO weak")
        assert not_ok(check_postgres(weak, None)) == {}
        connection.execute("DROP OWNED BY weak")
        connection.execute("DROP ROLE weak")


def test_databases_that_are_not() -> None:
    from tokentape.doctor.postgres import check_postgres

    secret = "postgresql://u:secret@127.0.0.1:1/x"
    checks = check_postgres(secret, None)
    assert statuses(checks) == {"reachable": WRONG}
    assert "secret" not in str(checks)


def test_a_server_that_may_forget() -> None:
    from tokentape.doctor.postgres import check_postgres

    with postgres(settings=("fsync=off", "max_connections=8")) as server:
        found = not_ok(check_postgres(server.dsn, None))
    assert found == {"durable": WRONG, "connections": WARNING}


# -- the command


def test_the_command(tmp_path: Path) -> None:
    store = tmp_path / "s.sqlite"
    args = ["doctor", "--model", str(TINY_MODEL), "--store", str(store), "--port", "0"]
    done = CliRunner().invoke(main, [*args, "--json"])
    said = json.loads(done.output)
    assert (done.exit_code, said["ok"]) == (0, True)
    assert {check["area"] for check in said["checks"]} == {"machine", "model", "store"}
    assert not store.exists()
    done = CliRunner().invoke(main, [*args, "--engine", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "→ start SGLang there" in " ".join(done.output.split())
    assert "1 wrong" in done.output
    done = CliRunner().invoke(main, ["doctor", "--port", "0"])
    assert done.exit_code == 0
    assert "nothing is wrong" in done.output
    assert CliRunner().invoke(main, ["doctor", "--port", "x"]).exit_code == 2
    (tmp_path / "f.toml").write_text("garbage")
    done = CliRunner().invoke(main, ["doctor", "--port", "0", "--formats", str(tmp_path / "f.toml")])
    assert (done.exit_code, "f.toml" in done.output) == (2, True)  # also without a model


def test_what_a_stranger_says_is_text() -> None:
    from rich.console import Console

    check = Check(area="engine [red]x", name="[b]", status=WRONG, found="[link=x]y[/] \x1b[31m", advice="[/]")
    console = Console(record=True, width=80)
    console.print(table([check]))
    shown = console.export_text()
    assert "[link=x]y[/]" in shown
    assert "\x1b[31m" not in shown
    assert not is_well([check])
