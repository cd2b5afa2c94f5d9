"""What must hold of exported samples, checked from the rows alone: no session, no tokenizer, no engine.

    >>> from tokentape.invariants import check_samples
    >>> check_samples([])
    []

Rows are what `GET /sessions/{id}/samples` answers, or what `pyarrow.parquet.read_table(…).to_pylist()`
returns. A trainer's pipeline can check the file that it was given with it; tokentape's own tests do the same.
"""

import base64
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]

MAX_LOGPROB = 1e-3
"""A log-probability, nats, may exceed 0 by float32 rounding of a softmax, not by more."""

_INT32 = range(-(2**31), 2**31)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "session_id": (str,),
    "sample_id": (str,),
    "branch_reason": (str,),
    "group_id": (str, type(None)),
    "label": (str,),
    "label_by": (str,),
    "token_ids": (list,),
    "loss_mask": (list,),
    "logprobs": (list,),
    "weight_versions": (list,),
    "sampling_logprobs": (list, type(None)),
    "support": (list, type(None)),
    "routed_experts": (dict, type(None)),
    "num_prompt_tokens": (int,),
    "turns": (list,),
    "reward": (float, int, type(None)),
    "truncated": (bool,),
    "messages": (str,),
    "tools": (str,),
    "sampling": (str,),
    "metadata": (str,),
}
_SPAN_TYPES: Mapping[str, type | tuple[type, ...]] = {"version": str, "start": int, "end": int}
_TURN_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "turn_id": str,
    "start": int,
    "end": int,
    "finish_reason": str,
    "trained": bool,
    "parse_status": str,
    "label": str,
    "logprob_basis": str,
    "reward": (float, int, type(None)),
}
_BASES = ("sampled", "untruncated", "greedy")
_ITEM_BYTES = {"uint8": 1, "uint16": 2}
_JSON_COLUMNS: Mapping[str, type] = {"messages": list, "tools": list, "sampling": list, "metadata": dict}


def check_samples(rows: Sequence[Row]) -> list[str]:
    """Every violated rule, in words; empty where all hold.

    The rows of a session must be complete: that each turn is trained once can only be seen over all of them.
    A rule is skipped where what it reads is reported as malformed already: one fault is reported once.
    """
    problems: list[str] = []
    sessions: dict[str, list[Row]] = defaultdict(list)
    malformed: set[str] = set()
    for index, row in enumerate(rows):
        found, is_sound = _check_row(row)
        problems += [f"sample {row.get('sample_id', f'#{index}')}: {problem}" for problem in found]
        session_id = str(row.get("session_id"))
        sessions[session_id].append(row)
        if not is_sound:
            malformed.add(session_id)
    for session_id in [s for s in sessions if s not in malformed]:
        problems += [f"session {session_id}: {problem}" for problem in _check_session(sessions[session_id])]
    return problems


def _check_row(row: Row) -> tuple[list[str], bool]:
    """What is wrong with a row; whether its turns can be compared with those of other rows at all."""
    problems = list(_columns(row))
    if problems:
        return problems, False
    problems = list(_lengths(row)) or list(_turns(row))
    if problems:
        return [*problems, *_json(row)], False
    problems = (
        list(_values(row))
        or list(_mask(row))
        or [
            *_logprobs(row),
            *_versions(row),
            *_captured(row),
        ]
    )
    return [*problems, *_scalars(row), *_json(row)], True


# -- columns and shapes


def _columns(row: Row) -> Iterator[str]:
    """All columns are there and have their types, nested ones as well."""
    for name, types in _TYPES.items():
        if name not in row:
            yield f"column {name} is missing"
        elif not isinstance(row[name], types) or (isinstance(row[name], bool) and bool not in types):
            yield f"{name} is a {type(row[name]).__name__}"
        elif name == "weight_versions":
            yield from _structs(name, row[name], _SPAN_TYPES)
        elif name == "turns":
            yield from _structs(name, row[name], _TURN_TYPES)
    if isinstance(row.get("turns"), list) and not row["turns"]:
        yield "there is no turn"


def _structs(name: str, items: Sequence[Any], fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[str]:
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            yield f"{name}[{index}] is a {type(item).__name__}"
            continue
        for field, type_ in fields.items():
            types = type_ if isinstance(type_, tuple) else (type_,)
            if type(item.get(field)) not in types:  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
                yield f"{name}[{index}].{field} is not a {types[0].__name__}"


def _lengths(row: Row) -> Iterator[str]:
    """The three arrays are parallel."""
    sizes = {name: len(row[name]) for name in ("token_ids", "loss_mask", "logprobs")}
    if len(set(sizes.values())) > 1:
        yield "arrays of different lengths: " + ", ".join(f"{name} {size}" for name, size in sizes.items())


def _values(row: Row) -> Iterator[str]:
    """Ids are int32 and not negative, the mask is 0 or 1."""
    bad = [i for i in row["token_ids"] if type(i) is not int or i < 0 or i not in _INT32]
    if bad:
        yield f"token_ids holds {bad[0]!r}"
    bad = [m for m in row["loss_mask"] if type(m) is not int or m not in (0, 1)]
    if bad:
        yield f"loss_mask holds {bad[0]!r}, not 0 or 1"


# -- what is said of each token


def _logprobs(row: Row) -> Iterator[str]:
    """A log-probability stands exactly where the mask is 1; it is one."""
    for at, (masked, logprob) in enumerate(zip(row["loss_mask"], row["logprobs"], strict=True)):
        if masked and logprob is None:
            yield f"token {at}: mask 1 without a log-probability"
        elif not masked and logprob is not None:
            yield f"token {at}: mask 0 with log-probability {logprob!r}, not null"
        elif logprob is not None and not _is_logprob(logprob):
            yield f"token {at}: {logprob!r} is no log-probability"


def _is_logprob(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value) and value <= MAX_LOGPROB


def _versions(row: Row) -> Iterator[str]:
    """Version spans are in order, do not overlap, and cover the masked tokens and no other."""
    size, end = len(row["token_ids"]), 0
    covered = [0] * size
    for span in row["weight_versions"]:
        if not 0 <= span["start"] < span["end"] <= size:
            yield f"version span {span['start']}:{span['end']} is empty or outside the tape"
            return
        if span["start"] < end:
            yield f"version span {span['start']}:{span['end']} overlaps the one before or is out of order"
            return
        end = span["end"]
        covered[span["start"] : end] = [1] * (end - span["start"])
    wrong = next((at for at in range(size) if covered[at] != row["loss_mask"][at]), None)
    if wrong is not None:
        what = "mask 0 with a version" if covered[wrong] else "mask 1 without a version"
        yield f"token {wrong}: {what}"


def _captured(row: Row) -> Iterator[str]:
    """Supports stand where tokens were sampled, with the token in them; routed experts are N-1 rows."""
    kept, logprobs, routed = row["support"], row["sampling_logprobs"], row["routed_experts"]
    size = len(row["token_ids"])
    if (kept is None) != (logprobs is None):
        yield "one of support and sampling_logprobs is null"
    elif kept is not None:
        if not len(kept) == len(logprobs) == size:
            yield f"support {len(kept)}, sampling_logprobs {len(logprobs)}, token_ids {size}"
            return
        for at, (ids, logprob) in enumerate(zip(kept, logprobs, strict=True)):
            if (ids is None) != (logprob is None):
                yield f"token {at}: one of its support and its sampling_logprob is null"
            elif ids is not None and not row["loss_mask"][at]:
                yield f"token {at}: mask 0 with a support"
            elif ids is not None and row["token_ids"][at] not in ids:
                yield f"token {at}: it is not in its own support"
            elif logprob is not None and not _is_logprob(logprob):
                yield f"token {at}: {logprob!r} is no log-probability (sampling_logprobs)"
    if routed is not None:
        width, item = routed.get("width"), _ITEM_BYTES.get(routed.get("dtype"))
        data = routed.get("data")
        num_bytes = len(base64.b64decode(data)) if isinstance(data, str) else len(data or b"")
        if type(width) is not int or item is None or num_bytes != (size - 1) * width * item:
            yield f"routed_experts is not of {size - 1} tokens"


def _turns(row: Row) -> Iterator[str]:
    """Turns' spans lie inside the tape, in order, without overlap."""
    size, end = len(row["token_ids"]), 0
    for turn in row["turns"]:
        if not 0 <= turn["start"] <= turn["end"] <= size:
            yield f"turn {turn['turn_id']}: span {turn['start']}:{turn['end']} is outside the tape"
            return
        if turn["start"] < end:
            yield f"turn {turn['turn_id']}: span {turn['start']}:{turn['end']} overlaps or is out of order"
            return
        end = turn["end"]
    if end != size:
        yield f"{size - end} tokens follow the last turn's completion"
    repeated = [turn_id for turn_id, n in Counter(t["turn_id"] for t in row["turns"]).items() if n > 1]
    if repeated:
        yield f"turn {repeated[0]} is there twice"


def _mask(row: Row) -> Iterator[str]:
    """A trained turn's span is all 1, every other token 0."""
    expected = [0] * len(row["token_ids"])
    for turn in row["turns"]:
        if turn["trained"]:
            expected[turn["start"] : turn["end"]] = [1] * (turn["end"] - turn["start"])
    for turn in row["turns"]:
        inside = slice(turn["start"], turn["end"])
        if row["loss_mask"][inside] != expected[inside]:
            state = "trained, but its mask is not all 1" if turn["trained"] else "not trained, but has mask 1"
            yield f"turn {turn['turn_id']}: {state}"
            expected[inside] = row["loss_mask"][inside]
    wrong = next((at for at, want in enumerate(expected) if row["loss_mask"][at] != want), None)
    if wrong is not None:
        yield f"token {wrong}: mask 1 outside every turn's completion"


# -- the rest of the row


def _scalars(row: Row) -> Iterator[str]:
    """What the row says about itself agrees with its turns."""
    first, leaf = row["turns"][0], row["turns"][-1]
    if row["num_prompt_tokens"] != first["start"]:
        yield f"num_prompt_tokens is {row['num_prompt_tokens']}, the first turn starts at {first['start']}"
    if row["sample_id"] != leaf["turn_id"]:
        yield f"sample_id is not the last turn's id {leaf['turn_id']}"
    if not row["label"] or not row["label_by"]:
        yield "label or label_by is empty"
    if row["label"] != leaf["label"]:
        yield f"label is {row['label']!r}, the last turn's {leaf['label']!r}"
    other = next((t for t in row["turns"] if t["trained"] and t["label"] != leaf["label"]), None)
    if other is not None:
        yield f"turn {other['turn_id']} is trained here, but its label is {other['label']!r}"
    for turn in row["turns"]:
        if turn["logprob_basis"] not in _BASES:
            yield f"turn {turn['turn_id']}: logprob_basis is {turn['logprob_basis']!r}"
        if turn["reward"] is not None and not math.isfinite(turn["reward"]):
            yield f"turn {turn['turn_id']}: reward is {turn['reward']!r}"
    if row["truncated"] != (leaf["finish_reason"] == "length"):
        yield f"truncated is {row['truncated']}, the last turn's finish_reason {leaf['finish_reason']!r}"
    if row["reward"] is not None and not math.isfinite(row["reward"]):
        yield f"reward is {row['reward']!r}"


def _json(row: Row) -> Iterator[str]:
    """The JSON columns are JSON, of the right shape."""
    for name, type_ in _JSON_COLUMNS.items():
        try:
            value: object = json.loads(row[name], parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            yield f"{name} is not JSON: {error}"
            continue
        if not isinstance(value, type_):
            yield f"{name} is no JSON {'object' if type_ is dict else 'array'}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# -- a session's rows together


def _check_session(rows: Sequence[Row]) -> Iterator[str]:
    """Each turn is trained once, and is the same in every row that holds it."""
    repeated = [sample_id for sample_id, n in Counter(row["sample_id"] for row in rows).items() if n > 1]
    if repeated:
        yield f"sample {repeated[0]} is there twice"
        return
    num_trained: Counter[str] = Counter()
    seen: dict[str, tuple[Row, int]] = {}
    for row in rows:
        for turn in row["turns"]:
            num_trained[turn["turn_id"]] += turn["trained"]
        for index, turn in enumerate(row["turns"]):
            first, at = seen.setdefault(turn["turn_id"], (row, index))
            if _turn(first, at) != _turn(row, index):
                one, other = first["sample_id"], row["sample_id"]
                yield f"turn {turn['turn_id']} differs between samples {one} and {other}"
                break  # so does all that follows it
    for turn_id, n in num_trained.items():
        if n != 1:
            yield f"turn {turn_id} is trained {n} times"


def _turn(row: Row, index: int) -> tuple[object, ...]:
    """What a turn is in every row that holds it: predecessor, place, outcome, label, ids since then."""
    turn = row["turns"][index]
    before = row["turns"][index - 1] if index else {"turn_id": None, "end": 0}
    ids = row["token_ids"][before["end"] : turn["end"]]
    said = turn["finish_reason"], turn["parse_status"], turn["label"], turn["logprob_basis"], turn["reward"]
    return before["turn_id"], turn["start"], turn["end"], *said, ids
