"""Draw the answer of README from a run of `steerlens recommend`: the card on top of its report.

python docs/draw_card.py RUN_DIR
"""

import sys
import tempfile
from pathlib import Path

import steerlens as sl

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))
from browser import open_browser  # noqa: E402 (it lies beside the tests)

ALONE = """const card = document.querySelector(".answer");
document.body.replaceChildren(card);
document.body.style.padding = "0.5rem";"""
CARD = {"width": 820, "height": 400, "deviceScaleFactor": 2, "mobile": False}

page = sl.report([sl.read_run(sys.argv[1])])
with (
    tempfile.TemporaryDirectory() as folder,
    open_browser(Path(folder) / "profile") as browser,
):
    path = Path(folder) / "report.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path)
    browser.run(ALONE)
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", CARD)
    body = browser.driver.find_element("css selector", "body")
    (DOCS / "answer.png").write_bytes(body.screenshot_as_png)
