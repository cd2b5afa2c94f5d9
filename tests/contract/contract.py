"""An engine under contract, and a few lines of HTTP."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp


@dataclass
class Contracted:
    """An engine under contract, and the model directory that fits it."""

    url: str
    http: aiohttp.ClientSession
    model_dir: Path
    context_length: int

    @property
    def much(self) -> int:
        """More tokens than are sampled while a test looks on."""
        return self.context_length - 100

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.http.request(method, self.url + path, json=body) as response:
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else await response.text()
