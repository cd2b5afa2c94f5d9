"""Where the embedded engine keeps keys and values: the running batch, and prefixes of what has finished.

Attention-only models run as one packed batch. Its rows are aligned at their *end* (left-padded), so that
every row writes its next token into the same column and a step needs no copy. A row joins by copying its
prefilled cache to the left of that column and leaves by moving the last row into its place. Models with
recurrent or shared states cannot be padded exactly; each of their generations keeps a cache of its own and is
stepped alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tokentape.errors import InternalError

# Per layer: keys and values, each [1, heads, tokens, width].
KeyValues: TypeAlias = list[tuple[Tensor, Tensor]]

MIN_COLUMNS = 256
GROWTH = 1.5
MAX_ENTRIES = 128  # of the prefix cache: each is compared with every new prompt


class Model(Protocol):
    """What is called of a transformers causal model."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        use_cache: bool,
        **keep: int,
    ) -> Any:
        """One forward pass; the result's `logits` are [B, T, V]."""
        ...


class Batch(Protocol):
    """The caches of the running generations, in the order in which they joined (see `leave`)."""

    def join(self, cache: DynamicCache, num_tokens: int) -> None:
        """Add a row that holds the `num_tokens` tokens of a prefilled cache."""
        ...

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        ...

    def extract(self, row: int) -> KeyValues | None:
        """A copy of a row's keys and values, or None where such a copy could not be reused."""
        ...

    def forward(self, model: Model, tokens: Sequence[int]) -> Tensor:
        """Append one token per row; logits [B, V] of the next."""
        ...


def is_packable(config: Any) -> bool:
    """Whether a model keeps keys and values per token, nothing else: its rows can be padded together."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) and not any(
        kind == "chunked_attention" for kind in getattr(config.get_text_config(), "layer_types", None) or ()
    )


def key_values(cache: DynamicCache, num_tokens: int) -> KeyValues:
    """The first `num_tokens` tokens of a batch-of-one cache, as views."""
    return [
        (layer.keys[:, :, :num_tokens], layer.values[:, :, :num_tokens])
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]


@dataclass(slots=True)
class _Window:
    """The live part of the packed storage: rows `0:rows`, columns `start:end`. Shared by all layers."""

    rows: int = 0
    start: int = 0
    end: int = 0


class _PackedLayer(CacheLayerMixin):
    """One layer of the packed batch: writes a step in place and returns the live part as views."""

    is_sliding = False

    def __init__(self, window: _Window, stores: tuple[Tensor, Tensor]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.window = window
        self.stores = stores  # keys and values, each [rows, heads, columns, width]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `PackedBatch` allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one step of every row behind the live columns; the live part with it."""
        window = self.window
        rows, stop = slice(0, window.rows), window.end + key_states.shape[-2]
        keys, values = self.stores
        keys[rows, :, window.end : stop] = key_states
        values[rows, :, window.end : stop] = value_states
        return keys[rows, :, window.start : stop], values[rows, :, window.start : stop]

    def get_seq_length(self) -> int:
        """Live columns, padding included."""
        return self.window.end - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask, and the first of them."""
        return self.window.end - self.window.start + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, by the name that it has in transformers 5.8."""
        return -1


class PackedBatch:
    """Rows of different lengths in one left-padded storage; for models that `is_packable` says yes to.

    Padding is exact: padded columns are masked out (their weight is exactly zero) and hold finite numbers,
    and every token keeps the position id that it has in its own sequence.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._window = _Window()
        self._lengths: list[int] = []
        self._layers: list[_PackedLayer] = []
        self._cache: Cache | None = None
        self._capacity = (0, 0)  # rows, columns
        self._mask = torch.zeros(0, 0, dtype=torch.bool, device=device)

    def join(self, cache: DynamicCache, num_tokens: int) -> None:
        """Add a row that holds the `num_tokens` tokens of a prefilled cache."""
        window = self._window
        source = key_values(cache, num_tokens)
        if self._cache is None:
            self._layers = [_PackedLayer(window, (k[:, :, :0], v[:, :, :0])) for k, v in source]
            self._cache = Cache(layers=list(self._layers))
        self._reserve(window.rows + 1, num_tokens)
        row, start = window.rows, window.end - num_tokens
        for layer, parts in zip(self._layers, source, strict=True):
            for store, part in zip(layer.stores, parts, strict=True):
                store[row, :, start : window.end] = part[0]
        self._mask[row, :start] = False
        self._mask[row, start:] = True
        self._lengths.append(num_tokens)
        window.rows += 1
        window.start = window.end - max(self._lengths)

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        window = self._window
        last = window.rows - 1
        if row != last:
            for layer in self._layers:
                for store in layer.stores:
                    store[row, :, : window.end] = store[last, :, : window.end]
            self._mask[row] = self._mask[last]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        window.rows = last
        # Columns that only the longest row reached are no longer looked at.
        window.start = window.end - max(self._lengths, default=0)

    def extract(self, row: int) -> KeyValues | None:
        """A copy of a row's keys and values."""
        columns = slice(self._window.end - self._lengths[row], self._window.end)
        return [
            (keys[row : row + 1, :, columns].clone(), values[row : row + 1, :, columns].clone())
            for keys, values in (layer.stores for layer in self._layers)
        ]

    def forward(self, model: Model, tokens: Sequence[int]) -> Tensor:
        """Append one token per row; logits [B, V] of the next."""
        window = self._window
        if self._cache is None:
            raise InternalError("a batch without rows cannot step")
        if window.end == self._capacity[1]:
            self._repack(self._capacity[0], window.end - window.start)
        logits = model(
            input_ids=torch.tensor(tokens, device=self._device)[:, None],
            attention_mask=self._mask[: window.rows, window.start : window.end + 1],
            position_ids=torch.tensor(self._lengths, device=self._device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        window.end += 1
        self._lengths = [n + 1 for n in self._lengths]
        return logits[:, -1]

    def _reserve(self, num_rows: int, num_tokens: int) -> None:
        """Make room for `num_rows` rows and for one of `num_tokens` to the left of the common end."""
        rows, columns = self._capacity
        window = self._window
        if num_rows > rows or num_tokens > window.end or window.end == columns:
            grown = rows if num_rows <= rows else max(num_rows, min(2 * rows, rows + 8))
            self._repack(grown, max(num_tokens, window.end - window.start))

    def _repack(self, num_rows: int, end: int) -> None:
        """Move the live part to new storage, its common end at column `end`, with room to grow behind it."""
        window = self._window
        columns = max(MIN_COLUMNS, int(end * GROWTH))
        live_rows, old = slice(0, window.rows), slice(window.start, window.end)
        new = slice(end - (window.end - window.start), end)

        def moved(store: Tensor) -> Tensor:
            # Zeros, not garbage: a masked column must hold a finite number, for 0 * NaN is NaN.
            bigger = store.new_zeros(num_rows, store.shape[1], columns, store.shape[3])
            bigger[live_rows, :, new] = store[live_rows, :, old]
            return bigger

        for layer in self._layers:
            layer.stores = (moved(layer.stores[0]), moved(layer.stores[1]))
        mask = torch.zeros(num_rows, columns, dtype=torch.bool, device=self._device)
        mask[live_rows, new] = self._mask[live_rows, old]
        mask[:, end:] = True
        self._mask = mask
        self._capacity = (num_rows, columns)
        window.start, window.end = new.start, end


class SeparateBatch:
    """One cache per generation, stepped one after the other: for models that cannot be padded exactly."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._caches: list[tuple[DynamicCache, int]] = []

    def join(self, cache: DynamicCache, num_tokens: int) -> None:
        """Add a row that holds the `num_tokens` tokens of a prefilled cache."""
        self._caches.append((cache, num_tokens))

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        last = self._caches.pop()
        if row < len(self._caches):
            self._caches[row] = last

    def extract(self, row: int) -> KeyValues | None:
        """None: a recurrent state cannot be cut back to a shorter prefix."""

    def forward(self, model: Model, tokens: Sequence[int]) -> Tensor:
        """Append one token per row; logits [B, V] of the next."""
        logits: list[Tensor] = []
        for row, (cache, num_tokens) in enumerate(self._caches):
            output = model(
                input_ids=torch.tensor([[tokens[row]]], device=self._device),
                attention_mask=torch.ones(1, num_tokens + 1, dtype=torch.bool, device=self._device),
                position_ids=torch.tensor([[num_tokens]], device=self._device),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[:, -1])
            self._caches[row] = (cache, num_tokens + 1)
        return torch.cat(logits)


class PrefixCache:
    """Keys and values of finished generations, `max_bytes` at most; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, tuple[Tensor, KeyValues, int]] = OrderedDict()
        self._next = 0

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def put(self, token_ids: Sequence[int], cache: KeyValues) -> None:
        """Keep the keys and values of int[L] tokens; entries that are a prefix of it are dropped."""
        ids = torch.tensor(token_ids, dtype=torch.int32)
        for key, (other, _, _) in list(self._entries.items()):
            if _common(ids, other) == len(other):
                del self._entries[key]
        size = sum(t.nbytes for pair in cache for t in pair)
        self._entries[self._next] = (ids, cache, size)
        self._next += 1
        while len(self._entries) > MAX_ENTRIES or self._num_bytes() > self._max_bytes:
            self._entries.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(size for _, _, size in self._entries.values())

    def longest(self, token_ids: Sequence[int], limit: int) -> tuple[int, KeyValues]:
        """The longest kept prefix of int[L] tokens, at most `limit`: its length, its keys and values."""
        ids = torch.tensor(token_ids[:limit], dtype=torch.int32)
        best, best_key = 0, -1
        for key, (other, _, _) in self._entries.items():
            if (common := _common(ids, other)) > best:
                best, best_key = common, key
        if not best:
            return 0, []
        self._entries.move_to_end(best_key)
        return best, [(k[:, :, :best], v[:, :, :best]) for k, v in self._entries[best_key][1]]


def _common(a: Tensor, b: Tensor) -> int:
    """Length of the common prefix of two int[L]."""
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).nonzero()
    return int(differ[0]) if len(differ) else n
