"""Pictures of every page of the labelling tool, to be looked at: results/annotate/*.png.

python -m tests.benchmarks.screenshots
"""

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from annotate.records import Item, Message, prompt_id
from stages import yamlfile
from tests.desk import Desk, Served, chromium

FOLDER = Path("results/annotate")
ASKED = (
    "Hello, my order 4711 has not come yet. It was promised for Tuesday. What can I do?",
    "I am sorry to hear that. Which address did you give?",
    "The one of my office, Hafenstraße 12. Can you send it again?",
)
REPLIES = (
    "I looked it up: the parcel was handed to the **carrier on Monday** and is late.\n\n"
    "1. Wait until Thursday evening.\n2. If it is not there by then, write to us; you get another."
    "\n\nYou can follow it under `orders/4711`.",
    "I looked it up: the parcel was handed to the **carrier on Friday** and is lost.\n\n"
    "1. Do nothing.\n2. If it is there by then, write to us; we send it again at your cost.",
)


def items() -> list[Item]:
    found = []
    for number in range(12):
        roles = ("user", "assistant", "user")
        prompt = [Message(role=role, content=text) for role, text in zip(roles, ASKED, strict=True)]
        prompt[0] = Message(role="user", content=ASKED[0].replace("4711", str(4711 + number)))
        texts = [reply.replace("4711", str(4711 + number)) for reply in REPLIES]
        row = {"id": prompt_id(prompt), "split": "train", "use": "preference", "prompt": prompt}
        found.append(Item(**row, completions=texts))
    return found


def small(png: bytes, name: str) -> None:
    """In 32 colours, which is what the page has."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(32, dither=Image.Dither.NONE)
    image.save(FOLDER / f"{name}.png", optimize=True)


def visit(browser: Browser, served: Served, name: str, width: int, height: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)

    def keep(page: str) -> None:
        desk.page.wait_for_timeout(200)
        small(desk.page.screenshot(), f"{page}-{name}")

    entry = context.new_page()
    entry.goto(served.home)
    small(entry.screenshot(), f"entry-{name}")
    desk = Desk(context, served, f"viewer {name}")
    keep("pair")
    desk.press("x")
    keep("differences")
    desk.press("m")
    desk.page.wait_for_selector(".replies .rich")
    keep("markdown")
    desk.press("m")
    for key, page in (("?", "help"), ("g", "guidelines"), ("s", "skip")):
        desk.press(key)
        keep(page)
        desk.page.keyboard.press("Escape")
    for key in "215620":
        desk.press(key)
    desk.press("u")
    keep("revise")
    desk.press("Enter")
    for _ in range(6):
        desk.press("4")
    desk.sent()
    desk.page.wait_for_selector('.stage[data-state="empty"]')
    keep("done")
    context.close()


def forms(browser: Browser, folder: Path) -> None:
    """A ranking of four, and a pair of which more is asked."""
    four = [
        item.model_copy(update={"completions": [*item.completions, item.completions[0][:99], ASKED[1]]})
        for item in items()
    ]
    for name, tasks, keys in (("ranking", four, "31"), ("helpful-honest-harmless", items(), "2")):
        (folder / name).mkdir()
        served = Served(folder / name, tasks, form=yamlfile.read(Path(f"configs/forms/{name}.yaml")))
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        desk = Desk(context, served, "viewer")
        for key in keys:
            desk.press(key)
        desk.page.wait_for_timeout(200)
        small(desk.page.screenshot(), f"form-{name}")
        desk.press("n")
        desk.page.wait_for_timeout(200)
        small(desk.page.screenshot(), f"form-{name}-note")
        context.close()
        served.kill()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        served = Served(Path(folder), items())
        visit(browser, served, "light", 1200, 800, "light")
        visit(browser, served, "dark", 1200, 800, "dark")
        visit(browser, served, "phone", 390, 780, "light")
        served.kill()
        forms(browser, Path(folder))


if __name__ == "__main__":
    main()
