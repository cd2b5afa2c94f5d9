-- Each migration runs once, in the order of the names; one that was released is never edited.
-- Text is compared byte by byte, as SQLite does. JSON is TEXT: JSONB cannot hold "\u0000" and reorders keys.
CREATE TABLE sessions (
    session_id TEXT COLLATE "C" PRIMARY KEY,
    state TEXT NOT NULL,
    created_at FLOAT8 NOT NULL,
    metadata TEXT NOT NULL,
    sampling TEXT NOT NULL,
    max_turns BIGINT,
    max_tokens BIGINT,
    deadline FLOAT8,
    reward FLOAT8,
    group_id TEXT,
    turn_rewards TEXT NOT NULL,
    branch_rewards TEXT NOT NULL,
    holder TEXT,  -- the replica that may write it
    fence BIGINT NOT NULL  -- counts its holders: a write names the fence it was taken with
);
CREATE INDEX sessions_by_state ON sessions (state, session_id);
CREATE INDEX sessions_by_holder ON sessions (holder) WHERE state = 'open';

CREATE TABLE turns (
    seq BIGINT GENERATED ALWAYS AS IDENTITY,  -- the order of a session's commits
    turn_id TEXT PRIMARY KEY,
    session_id TEXT COLLATE "C" NOT NULL,
    parent_id TEXT,
    branch_reason TEXT,
    prompt BYTEA NOT NULL,
    completion BYTEA NOT NULL,
    logprobs BYTEA NOT NULL,
    versions TEXT NOT NULL,
    logprob_basis TEXT NOT NULL,
    support BYTEA,
    routed_experts BYTEA,
    finish_reason TEXT NOT NULL,
    stop_id BIGINT,
    messages TEXT NOT NULL,
    reply TEXT NOT NULL,
    in_reasoning BOOLEAN NOT NULL,
    parse_status TEXT NOT NULL,
    attempts TEXT NOT NULL,
    tools TEXT,
    arguments TEXT,
    sampling TEXT NOT NULL,
    neutralised TEXT NOT NULL,
    superseded TEXT NOT NULL,
    origin TEXT NOT NULL,
    num_cached_tokens BIGINT,
    created_at FLOAT8 NOT NULL
);
CREATE INDEX turns_by_session ON turns (session_id, seq);

CREATE TABLE failures (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id TEXT COLLATE "C" NOT NULL,
    kind TEXT NOT NULL,
    message BYTEA NOT NULL,  -- UTF-8 of whatever an engine said: TEXT cannot hold NUL
    num_tokens BIGINT NOT NULL,
    created_at FLOAT8 NOT NULL
);
CREATE INDEX failures_by_session ON failures (session_id, seq);

CREATE TABLE weights (
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    version TEXT PRIMARY KEY,
    first_seen_at FLOAT8 NOT NULL,
    said_by TEXT NOT NULL
);

CREATE TABLE replicas (  -- who is there: a row that has expired has lost all its sessions
    replica_id TEXT PRIMARY KEY,
    url TEXT,
    is_leaving BOOLEAN NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL
);
