"""Draw the viewer's pictures in `images/`: its views in a real browser, over scripted sessions.

python docs/make_images.py     (needs chromium, and the dev group's playwright and pillow)
"""

import asyncio
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.async_api import async_playwright

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "viewer")]

from viewerkit import populate, real_model, world  # noqa: E402

IMAGES = Path(__file__).with_name("images")
REPAIR = "#/s/repair-0412"
TOKENS = f"{REPAIR}?tab=tokens"
# name, address, what must be there, light or dark
VIEWS = (
    ("viewer-sessions", "#/", "tr[data-id='repair-0412'] td:nth-child(9):not(:empty)", "light"),
    ("viewer-messages", REPAIR, ".message", "light"),
    ("viewer-provenance", f"{TOKENS}&at=420", ".t.at", "light"),
    ("viewer-logprob", f"{TOKENS}&colour=logprob&at=366", ".t.at", "dark"),
    ("viewer-version", f"{TOKENS}&colour=version&at=500", ".t.at", "light"),
    ("viewer-drift", f"{TOKENS}&colour=drift&at=267", ".t.drifts.at", "light"),
    ("viewer-search", f"{TOKENS}&q=pages", ".t.hit", "dark"),
    ("viewer-compare", f"{REPAIR}?tab=compare", ".t.differs", "light"),
    ("viewer-wire", f"{REPAIR}?tab=wire", ".wire pre", "light"),
    ("viewer-hostile", "#/s/hostile-1", ".message", "dark"),
)
_COLOURS = 160


async def main() -> None:
    """All pictures, in a palette that keeps them small."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model = real_model(Path(directory))
        async with world(model, Path(directory) / "store.sqlite") as made, async_playwright() as playwright:
            await populate(made)
            browser = await playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            for name, where, there, scheme in VIEWS:
                page = await browser.new_page(
                    viewport={"width": 1240, "height": 700},
                    color_scheme="dark" if scheme == "dark" else "light",
                )
                await page.goto(f"{made.gateway.url}/ui/{where}")
                await page.wait_for_selector(there)
                await page.wait_for_timeout(500)
                picture = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
                small = picture.quantize(_COLOURS, dither=Image.Dither.NONE)
                small.save(IMAGES / f"{name}.png", optimize=True)
                await page.close()
            await browser.close()


asyncio.run(main())
