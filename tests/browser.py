"""Chromium without a window, to look at pages as a reader would; tests skip where there is none."""

from __future__ import annotations

import html
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def browser(page: Path, *arguments: str) -> str:
    """What headless Chromium prints for a page, with every host out of reach."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=900,400",
        "--virtual-time-budget=10000",
        *arguments,
        page.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ran.stdout


def picture(page: Path, *arguments: str) -> np.ndarray:
    """A screenshot: pixels by rows, red, green and blue from 0 to 255."""
    file = page.with_suffix(".png")
    browser(page, f"--screenshot={file}", *arguments)
    return (255 * matplotlib.image.imread(file)[..., :3]).round().astype(int)


def page(path: Path, body: str) -> Path:
    path.write_text(f"<!doctype html><meta charset='utf-8'><body>{body}", encoding="utf-8")
    return path


# Frames of another process do not take part in the browser's virtual time.
SHARED = "--disable-features=IsolateSandboxedIframes"


def frame(path: Path, body: str, allowed: str) -> Path:
    """A page that is nothing but a sandboxed frame, as Colab and VS Code show outputs."""
    within = html.escape(f"<!doctype html><meta charset='utf-8'><body>{body}")
    style = "body{margin:0}iframe{border:0;width:900px;height:600px;display:block}"
    return page(path, f"<style>{style}</style><iframe sandbox='{allowed}' srcdoc='{within}'>")
