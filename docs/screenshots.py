"""Shows `bomemeta serve`'s page some photographs in a headless browser, and writes what it looks like.

    bomemeta serve RUN_DIR                                  # in another shell
    python docs/screenshots.py http://127.0.0.1:8000 KNOWN NEW --out docs/figures

KNOWN and NEW are folders of class folders; three classes of them are fitted and asked. It needs chromedriver and selenium.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTHS = (1200, 420)  # of a desk and of a telephone, in pixels
HEIGHT = 800  # at least
LONGEST_S = 300.0  # a busy machine may take for one answer


def chrome() -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST_S
    while not done():
        if time.monotonic() > end:
            raise TimeoutError("the page took too long")
        time.sleep(0.2)


def fit(browser: Any, examples: Mapping[str, Sequence[Path]]) -> None:
    """Fills in a box for each class, presses Fit and waits for the answer."""
    boxes = browser.find_elements("class name", "class")
    for _ in range(len(examples) - len(boxes)):
        browser.find_element("id", "more").click()
    boxes = browser.find_elements("class name", "class")
    for box, (name, files) in zip(boxes, examples.items(), strict=True):
        box.find_element("css selector", "input:not([type=file])").send_keys(name)
        chosen = box.find_element("css selector", "input[type=file]")
        chosen.send_keys("\n".join(map(str, files)))
    browser.find_element("id", "fit").click()
    known = [f"{name} ({len(files)})" for name, files in examples.items()]
    wait(lambda: all(one in browser.find_element("id", "known").text for one in known))


def ask(browser: Any, files: Sequence[Path]) -> list[str]:
    """The class of each file: what its first bar is called."""
    count = len(browser.find_elements("class name", "result")) + len(files)
    browser.find_element("id", "ask").send_keys("\n".join(map(str, files)))
    wait(lambda: len(browser.find_elements("class name", "result")) == count)
    bars = browser.find_elements("css selector", ".bar:first-child span:first-child")
    # The page puts the last one on top.
    return [bar.text for bar in bars[: len(files)]][::-1]


def photographed(browser: Any, folder: Path) -> list[Path]:
    """The whole page at each of WIDTHS, in the light colours: FOLDER/serve_WIDTH.png."""
    from PIL import Image

    light = {"name": "prefers-color-scheme", "value": "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [light]})
    written = []
    for width in WIDTHS:
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        tall = browser.execute_script("return document.documentElement.scrollHeight")
        size["height"] = max(tall, HEIGHT)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        path = folder / f"serve_{width}.png"
        browser.save_screenshot(str(path))
        with Image.open(path) as picture:  # 256 colours are a third of the bytes
            picture.convert("RGB").quantize(256).save(path, optimize=True)
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("known", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--classes", nargs="+", default=None, help="three of the folders")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    names = options.classes or sorted(path.name for path in options.known.iterdir())[:3]
    browser = chrome()
    try:
        browser.get(options.url)
        fit(browser, {name: _files(options.known / name)[:3] for name in names})
        print(ask(browser, [_files(options.new / name)[0] for name in names]))
        print(*photographed(browser, options.out))
    finally:
        browser.quit()


def _files(folder: Path) -> list[Path]:
    return sorted(path.resolve() for path in folder.iterdir())


if __name__ == "__main__":
    main()
