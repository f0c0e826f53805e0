"""Chromium without a screen: what a page shows, says on its console, and asks the network for."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--hide-scrollbars --force-device-scale-factor=1"
).split()
DRAWN = """[...document.querySelectorAll(".figure")].every((figure) =>
  figure.classList.contains("view") ? figure.firstElementChild?.tagName !== "P"
    : figure.querySelector("svg.marks"))"""
"""JavaScript: every chart of Vega and every view of circuitsvis on a page is there."""
BOXES = """
const seen = (element) => element.checkVisibility() && element.getClientRects().length > 0;
const box = (element) => element.getBoundingClientRect();
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
const told = [];
const compare = (elements, name) => {
  const boxes = elements.map((element) => [element, box(element)]);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    if (meet(a, b)) told.push([name, one, other].map((e) => e.textContent ?? e).join(" | "));
  }));
};
for (const chart of document.querySelectorAll("svg.marks")) {
  const name = chart.closest("figure")?.querySelector("h4").textContent ?? "chart";
  const place = box(chart), texts = [...chart.querySelectorAll(
    ".role-axis-title text, .role-axis-label text, .role-title text, .role-legend-title text, "
    + ".role-legend-label text")].filter((text) => text.textContent
    && getComputedStyle(text).opacity !== "0" && text.getAttribute("opacity") !== "0");
  compare(texts, name);
  for (const text of texts) {
    const at = box(text);
    if (at.left < place.left - 2 || at.right > place.right + 2)
      told.push(`${name} leaves: ${text.textContent}`);
  }
}
for (const parent of document.querySelectorAll("main section, figure"))
  compare([...parent.children].filter(seen), parent.id || parent.tagName);
if (document.documentElement.scrollWidth > innerWidth) told.push("the page is too wide");
for (const grid of document.querySelectorAll(".scroll"))
  if (innerWidth >= 1400 && grid.scrollWidth > grid.clientWidth)
    told.push(`wide: ${grid.closest("section").id} by ${grid.scrollWidth - grid.clientWidth}`);
for (const place of document.querySelectorAll(".scroll-x"))
  if (place.scrollWidth > place.clientWidth) told.push(`scrolls: ${place.ariaLabel}`);
return told"""
"""What overlaps, leaves its place or has to be scrolled sideways: figures in any window, tables
in a wide one."""
INSTALL = "apt-get install -y --no-install-recommends chromium chromium-driver"
LOCAL = ("file:", "data:", "blob:", "about:", "chrome:", "devtools:")


def find_chromium() -> tuple[str, str]:
    """Paths of Chromium and its driver; without them the test is skipped, and fails in CI."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = f"needs Chromium and its driver: {INSTALL}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return browser, driver


@contextmanager
def open_browser(profile: Path) -> Iterator["Browser"]:
    """A browser with a profile of its own, a new and empty folder, closed behind the block."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    browser, driver = find_chromium()
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With its path given, selenium looks for no driver, here or elsewhere.
    chrome = Chrome(options=options, service=Service(executable_path=driver))
    chrome.set_script_timeout(120)
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


@dataclass(frozen=True)
class Browser:
    """A running Chromium; `driver` is selenium's."""

    driver: Any

    def open(
        self,
        page: Path,
        *,
        width: int = 1200,
        height: int = 900,
        dark: bool = False,
        scripts: bool = True,
        media: str = "",
    ) -> None:
        """Open a file as from a disk, in a window of that size; logs begin anew."""
        self.messages()
        self.requests()
        cdp = self.driver.execute_cdp_cmd
        cdp("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        cdp(
            "Emulation.setEmulatedMedia",
            {
                "media": media,
                "features": [
                    {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                ],
            },
        )
        cdp(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.driver.get(page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that JavaScript returns; a promise is waited for."""
        wrapped = (
            "const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);"
            f"(async function () {{ {script} }}).apply(null, given)"
            ".then((value) => done({value}), (error) => done({error: String(error)}));"
        )
        outcome = self.driver.execute_async_script(wrapped, *arguments)
        assert "error" not in outcome, outcome["error"]
        return outcome.get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        """Wait until a JavaScript expression is true; an assertion fails when it never is."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(
            lambda driver: driver.execute_script(f"return Boolean({condition})"), condition
        )

    def messages(self) -> list[str]:
        """What the console has said since the page was opened or this was last asked."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What was asked of a network since, by address: nothing inside the page or on the disk."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                given = message["params"]
                found.append(given["request"]["url"] if "request" in given else given["url"])
        return [url for url in found if not url.startswith(LOCAL)]

    def text(self, selector: str) -> str:
        """The text that a reader sees of the first element that matches."""
        return str(
            self.driver.execute_script(
                "return document.querySelector(arguments[0]).innerText", selector
            )
        )

    def picture(self, path: Path, *, full: bool = False) -> None:
        """A PNG of the window, or of the full page."""
        import base64

        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": full}
        )
        path.write_bytes(base64.b64decode(shot["data"]))
