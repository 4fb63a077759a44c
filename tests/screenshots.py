"""Take the README's pictures of TensorBoard: `python tests/screenshots.py RUN_DIR FOLDER`.

A real TensorBoard server, looked at by a real headless Chromium (Debian's chromium and chromium-driver).
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"


def missing() -> str:
    """What is missing for a browser, or nothing."""
    return "" if shutil.which(CHROMIUM) and shutil.which(DRIVER) else "needs Debian's chromium and chromium-driver"


@contextlib.contextmanager
def tensorboard(log_dir: Path, *flags: str, name: str = "") -> Iterator[str]:
    """Serve a folder, or one run under a name; gives the address once the server has read it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            *(["--logdir_spec", f"{name}:{log_dir.name}"] if name else ["--logdir", log_dir.name]),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--samples_per_plugin",
            "scalars=1000000",
            *flags,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=log_dir.parent,  # the page shows the folder's name
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if len(urllib.request.urlopen(f"{address}/data/runs").read()) > 4:
                    break
            assert time.monotonic() < deadline, "TensorBoard did not start"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[WebDriver]:
    """A headless Chromium that talks to nobody but this machine."""
    with tempfile.TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--window-size={width},{height}",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(DRIVER, log_output=os.devnull))
        try:
            yield driver
        finally:
            driver.quit()


# All text of a page, through the shadow trees that TensorBoard's older tabs are made of.
PAGE_TEXT = """
const walk = node => [...node.childNodes].map(child =>
  child.nodeType === 3 ? child.textContent :
  ["STYLE", "SCRIPT"].includes(child.tagName) ? "" : (child.shadowRoot ? walk(child.shadowRoot) : "") + walk(child)
).join(" ");
return walk(document.body);
"""
# How many elements match, likewise, with a size on the screen.
COUNT = """
const find = root => [...root.querySelectorAll("*")].reduce((count, element) => count
  + (element.matches(arguments[0]) && element.getBoundingClientRect().height > 0 ? 1 : 0)
  + (element.shadowRoot ? find(element.shadowRoot) : 0), 0);
return find(document);
"""
# How many points the lines of each chart hold together, likewise.
POINTS = """
const find = root => [...root.querySelectorAll("*")].flatMap(element =>
  [...(element.matches(arguments[0]) && element._chart
    ? [element._chart.linePlot.datasets().reduce((sum, line) => sum + line.data().length, 0)] : []),
   ...(element.shadowRoot ? find(element.shadowRoot) : [])]);
return find(document);
"""


# Click the first element whose own text is this, likewise.
CLICK = """
const find = root => [...root.querySelectorAll("*")].some(element => {
  const own = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.textContent).join("").trim();
  if (own === arguments[0]) element.click();
  return own === arguments[0] || (element.shadowRoot && find(element.shadowRoot));
});
return find(document);
"""


def wait_for(driver: WebDriver, script: str, argument: str, holds: "object", seconds: float = 60) -> object:
    """Run a script until a condition of its result holds."""
    deadline = time.monotonic() + seconds
    while not holds(result := driver.execute_script(script, argument)):  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not seen within {seconds} s: {result!r}"[:2000]
        time.sleep(0.5)
    return result


def main(run_dir: Path, folder: Path) -> None:
    with tensorboard(run_dir / "runs", name=run_dir.name) as address, browser(1900, 2560) as driver:
        driver.get(f"{address}/#custom_scalars")
        wait_for(driver, COUNT, "vz-line-chart2", lambda count: count >= 8)
        time.sleep(5)  # the lines are drawn bit by bit
        driver.save_screenshot(str(folder / "custom_scalars.png"))
        driver.set_window_size(1400, 900)
        driver.get(f"{address}/?#images")
        wait_for(driver, COUNT, "img", lambda count: count >= 1)
        time.sleep(3)
        driver.save_screenshot(str(folder / "heat_map.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
