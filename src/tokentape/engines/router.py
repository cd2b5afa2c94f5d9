"""What differs where sglang-router stands between the gateway and several SGLang servers. No I/O.

    generations ─▶ the router ─▶ one of its servers, by X-SMG-Routing-Key
    all else    ─▶ each of the servers that its `GET /workers` lists

Facts were observed on sglang-router 0.3.2: it has no `/abort_request`, `/model_info` and `/server_info`; its
`/get_model_info` is some server's, its `/v1/models` tells no length. It reads `/generate` into fields of its
own and writes those to the server: what it does not know is dropped without a word.
"""

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from tokentape.engines.base import EngineInfo, GenerateRequest
from tokentape.errors import EngineRejected, EngineUnavailable, RequestError


class Listed(msgspec.Struct):
    """One server of a router."""

    url: str


class Listing(msgspec.Struct):
    """The answer of a router's `GET /workers`; SGLang itself has no such route."""

    workers: list[Listed]


def check_passes(request: GenerateRequest) -> None:
    """Refuse what the router would drop: the answer would look sound and be of another distribution.

    `stream_interval` is dropped, too: it only saves bytes.

    Raises:
        EngineRejected: the operator asked to capture what the router does not ask for.
        RequestError: the caller asked for a bias, or for a reply that only a structural tag can hold.
    """
    sampling = request.sampling
    if sampling.logit_bias:
        raise RequestError(_DROPS.format("logit_bias"), param="logit_bias")
    if sampling.structural_tag is not None:
        what = "structural_tag, which alone can hold the reply to what was asked of it"
        raise RequestError(_DROPS.format(what), param="response_format")
    if request.capture_support:
        raise EngineRejected(_DROPS.format("return_sampling_mask (--capture support)"))
    if request.experts_from is not None:
        raise EngineRejected(_DROPS.format("return_routed_experts (--capture routed-experts)"))


_DROPS = "sglang-router drops {}: give the gateway its servers' own URLs instead (--engine, repeated)"


def joined_info(said: Mapping[str, EngineInfo | BaseException]) -> EngineInfo:
    """What servers say of themselves, by their URLs: the first's word, the shortest context of all.

    Those that did not answer are left out. The weights' version is one that all of them name, else None;
    `weight_versions` has each one's.

    Raises:
        EngineError: none of them answers; the error is the first one's.
    """
    infos = {url: info for url, info in said.items() if isinstance(info, EngineInfo)}
    if not infos:
        nobody = EngineUnavailable("the router has no workers")
        raise next((error for error in said.values() if isinstance(error, BaseException)), nobody)
    first = next(iter(infos.values()))
    if len(said) == 1:
        return first
    versions: dict[str, str | None] = {}
    for url, info in infos.items():
        versions |= info.weight_versions or {url: info.weight_version}
    lengths = [info.context_length for info in infos.values() if info.context_length is not None]
    return replace(
        first,
        context_length=min(lengths, default=None),
        weight_version=first.weight_version if len(set(versions.values())) == 1 else None,
        weight_versions=versions,
    )
