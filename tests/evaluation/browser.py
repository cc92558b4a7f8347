"""A headless browser, where one is installed: pictures of a page, and how wide it is on a screen."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import PIL.Image
import pytest

NAMES = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
# A window is never narrower than 500 px, a frame in it is: it shows a page as a phone does.
FRAME = """<!doctype html><body style="margin:0"><iframe id="f" src="{page}" width="{width}" height="{height}"
style="border:0"></iframe><pre id="told"></pre><script>
f.onload = () => {{
  const doc = f.contentDocument, box = doc.documentElement;
  const wide = [...doc.querySelectorAll("body *")].filter(e => !e.closest(".wide, pre") || e.matches(".wide, pre"))
    .filter(e => e.getBoundingClientRect().right > box.clientWidth + 1).map(e => e.tagName);
  const broken = [...doc.images].filter(i => !i.complete || !i.naturalWidth).length;
  told.textContent = JSON.stringify([box.scrollWidth, box.clientWidth, wide.length, broken, doc.images.length]);
}}
</script>"""


def browser() -> str:
    """The browser's path; without one the test is skipped, and says how to get one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium")
    return found


def look(page: Path, folder: Path, width: int, height: int) -> tuple[list[int], PIL.Image.Image]:
    """([width of the content, width of the screen, elements that stick out, broken images, images], a picture)."""
    frame, shot = folder / f"frame-{width}.html", folder / f"shot-{width}.png"
    frame.write_text(FRAME.format(page=page.resolve().as_uri(), width=width, height=height))
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},{height}"]
    environment = os.environ | {"HOME": str(folder)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 120, "check": True}
    dom = subprocess.run([*command, "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()], **options).stdout
    told = re.search(r'<pre id="told">\[([\d,]+)\]</pre>', dom)
    assert told, dom[-2000:]
    subprocess.run([*command, "--virtual-time-budget=5000", f"--screenshot={shot}", frame.as_uri()], **options)
    with PIL.Image.open(shot) as image:
        return [int(number) for number in told[1].split(",")], image.convert("RGB").crop((0, 0, width, height))
