from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from lenskit.figures.views import Html, attention_view, script, tokens_view

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

TOKENS = ["<bos>", " terrified", " of", " spiders", ".", "<|eot_id|>", "assistant", "\n\n"]


def attention_to(position: int, *, heads: int = 2, queries: int = 3) -> torch.Tensor:
    attention = torch.full((heads, queries, len(TOKENS)), 0.01)
    attention[:, :, 0] = 0.8
    attention[:, 0, position] = 0.13
    return attention


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


@needs_chromium
def test_a_saved_page_draws_its_views_without_a_network(tmp_path):
    attention = attention_view(TOKENS, attention_to(3))
    values = tokens_view(TOKENS, torch.linspace(-1, 1, len(TOKENS)))
    page = (attention + values).save_html(tmp_path / "page.html", title="a & b")

    dom = browser(page, "--dump-dom")
    first, second = re.findall(r'<div class="lenskit-view".*?(?=<script>)', dom, re.DOTALL)
    assert "An interactive view" not in dom
    # Fully blue where the first candidate looks, and at the largest value.
    assert re.search(r"background-color: rgb\(0, 0, 255\)[^>]*>&nbsp;spiders<", first)
    assert re.search(r"background-color: rgb\(255, 0, 0\)[^>]*>&lt;\u2060bos&gt;<", second)
    assert re.search(r"background-color: rgb\(0, 0, 255\)[^>]*>↵↵&nbsp;<", second)
    assert "-3 &lt;\u2060|eot_id|&gt;" in first

    picture = tmp_path / "page.png"
    browser(page, f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)[..., :3].reshape(-1, 3)
    colours = np.unique(pixels, axis=0)
    assert len(colours) > 50
    for colour in ((0, 0, 1), (1, 0, 0)):
        assert (pixels == np.array(colour, pixels.dtype)).all(1).sum() > 100


@needs_chromium
def test_one_script_draws_views_before_and_after_it_beside_a_module_loader(tmp_path):
    view = tokens_view(TOKENS, range(len(TOKENS)))
    loader = "<script>window.define = () => { throw 'taken' }; define.amd = {}</script>"
    parts = (loader, view.body, script().body, script().body, view.body, view.body)
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><meta charset='utf-8'>" + "".join(parts), encoding="utf-8")

    dom = browser(page, "--dump-dom")
    assert dom.count('class="colored-tokens"') == 3
    assert len(set(re.findall(r'id="(lenskit-view-\d+)"', dom))) == 3


def test_a_view_is_small_and_fetches_nothing():
    tokens = [f" token{index}" for index in range(200)]
    view = attention_view(tokens, torch.rand(12, 5, 200))
    assert len(view.body) < 20_000
    assert len(script().body) < 600_000
    assert "src=" not in view.body + script().body
    assert "http" not in view.body


def test_a_notebook_stores_a_short_text_beside_the_html():
    assert len(repr(script())) < 40
    assert script()._repr_html_() == script().body


def test_tokens_cannot_break_out_of_the_markup():
    view = tokens_view(['"><script>alert(1)</script>', "&lt;"], [0.0, 1.0])
    assert "<script>alert" not in view.body
    assert view.body.count("<script>") == 1


def test_attention_takes_the_mean_the_maximum_or_one_head():
    attention = attention_to(3)
    attention[1] *= 3
    pairs = {"mean": attention.mean(0), "max": attention[1], 0: attention[0]}
    for heads, expected in pairs.items():
        given = attention_view(TOKENS, attention, heads=heads)  # type: ignore[arg-type]
        assert given == attention_view(TOKENS, expected)


def test_the_colours_of_attention_leave_out_the_first_token():
    view = attention_view(TOKENS, attention_to(3))
    assert "&quot;positiveBounds&quot;: [0.13, 0.13, 0.13]" in view.body
    assert "[0.5, 0.5, 0.5]" in attention_view(TOKENS, attention_to(3), bound=0.5).body


def test_values_that_are_all_zero_still_give_a_colour_scale():
    assert "&quot;maxValue&quot;: 1.0" in tokens_view(["a", "b"], [0.0, 0.0]).body


@pytest.mark.parametrize(
    "call",
    [
        lambda: tokens_view(["a", "b"], [1.0]),
        lambda: tokens_view(["a"], [float("nan")]),
        lambda: tokens_view(["a"], [1.0], labels=["x"]),
        lambda: tokens_view(["a"], torch.ones(1, 2), labels=["x"]),
        lambda: attention_view(["a", "b"], torch.ones(1, 2, 3)),
        lambda: attention_view(["a"], torch.ones(1, 2, 1)),
        lambda: attention_view(["a"], torch.ones(1, 1, 1), heads=1),
        lambda: attention_view(["a"], torch.ones(1, 1, 1), heads="median"),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match="values|attention|labels|heads"):
        call()


def test_a_circuitsvis_without_its_script_is_named(monkeypatch, tmp_path):
    import lenskit.figures.views

    lenskit.figures.views._script.cache_clear()
    monkeypatch.setattr(lenskit.figures.views, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="circuitsvis 1.43.3"):
        Html("").save_html(tmp_path / "page.html")
