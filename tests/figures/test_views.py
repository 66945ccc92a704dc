from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from browser import SHARED, browser, frame, needs_chromium, page, picture
from nbconvert import HTMLExporter

import lenskit.figures.views
from lenskit.figures.views import Html, attention_view, script, tokens_view

TOKENS = ["<bos>", " terrified", " of", " spiders", ".", "<|eot_id|>", "assistant", "\n\n"]


def attention_to(position: int, *, heads: int = 2, queries: int = 3) -> torch.Tensor:
    attention = torch.full((heads, queries, len(TOKENS)), 0.01)
    attention[:, :, 0] = 0.8
    attention[:, 0, position] = 0.13
    return attention


@needs_chromium
def test_a_saved_page_draws_its_views_without_a_network(tmp_path):
    attention = attention_view(TOKENS, attention_to(3))
    values = tokens_view(TOKENS, torch.linspace(-1, 1, len(TOKENS)))
    saved = (attention + values).save_html(tmp_path / "page.html", title="a & b")

    dom = browser(saved, "--dump-dom")
    _, first, second = dom.split('class="lenskit-view"')
    assert "<img" not in first + second
    # Fully blue where the last candidate looks, and at the largest value.
    assert re.search(r"background-color: rgb\(0, 114, 178\)[^>]*>&nbsp;spiders<", first)
    assert first.count("<canvas") == 2 + 1  # the heads, and the one that is shown large
    assert re.search(r"background-color: rgb\(213, 94, 0\)[^>]*>&lt;\u2060bos&gt;<", second)
    assert re.search(r"background-color: rgb\(0, 114, 178\)[^>]*>↵↵<", second)

    shown = picture(saved, "--window-size=900,900").reshape(-1, 3)
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (shown == colour).all(1).sum() > 100


@needs_chromium
def test_a_view_is_drawn_in_an_isolated_frame_as_on_a_page_of_its_own(tmp_path):
    body = attention_view(TOKENS, attention_to(3)).body
    size = "--window-size=900,600"
    alone = picture(page(tmp_path / "alone.html", body), size)
    framed = picture(frame(tmp_path / "framed.html", body, "allow-scripts"), size, SHARED)
    # A chart's labels may differ by a pixel or so from one run to the next.
    assert (alone == framed).all(-1).mean() > 0.99
    assert len(np.unique(alone.reshape(-1, 3), axis=0)) > 50


@needs_chromium
def test_a_still_picture_stays_where_scripts_do_not_run(tmp_path):
    view = attention_view(TOKENS, attention_to(3))
    assert 'alt="attention from 3 candidate tokens' in view.body
    silent = picture(frame(tmp_path / "still.html", view.body, ""), "--window-size=900,600", SHARED)
    assert (silent == (0, 114, 178)).all(-1).sum() > 100


@needs_chromium
def test_an_exported_notebook_draws_every_view_even_the_same_one_twice(tmp_path):
    view = tokens_view(TOKENS, range(len(TOKENS)))
    loader = Html("<script>window.define = () => { throw 'taken' }; define.amd = {}</script>")
    outputs = [
        nbformat.v4.new_output("display_data", one._repr_mimebundle_())
        for one in (loader, view, view, attention_view(TOKENS, attention_to(3)))
    ]
    cells = [nbformat.v4.new_code_cell("", outputs=[output]) for output in outputs]
    exported, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    file = tmp_path / "notebook.html"
    file.write_text(exported, encoding="utf-8")

    dom = browser(file, "--dump-dom")
    assert dom.count('class="colored-tokens"') == 3
    assert len(set(re.findall(r'id="(lenskit-view-\d+)"', dom))) == 4


@needs_chromium
def test_another_block_is_shown_when_it_is_chosen(tmp_path):
    both = torch.stack([attention_to(3), attention_to(1)])
    view = attention_view(TOKENS, both, blocks=[4, 6], block=6)
    choose = (
        "<script>setTimeout(() => { const block = document.querySelector('select');"
        "block.value = 0; block.onchange(); }, 3000)</script>"
    )
    dom = browser(page(tmp_path / "page.html", view.body + choose), "--dump-dom")
    assert re.search(r"background-color: rgb\(0, 114, 178\)[^>]*>&nbsp;spiders<", dom)
    assert re.findall(r"<option[^>]*>(\d+)<", dom) == ["4", "6"]


def test_a_view_is_small_and_fetches_nothing():
    tokens = [f" token{index}" for index in range(60)]
    view = attention_view(tokens, torch.rand(8, 12, 5, 60))
    assert len(tokens_view(TOKENS, range(len(TOKENS))).body) < 220_000
    assert len(view.body) < 400_000
    assert set(re.findall(r'src="(.{15})', view.body)) == {"data:image/png;"}
    assert "http" not in re.sub(r'"[\w+/=]{200,}"', "", view.body)


def test_a_script_cell_of_an_older_notebook_does_no_harm():
    assert script().body == ""


def test_a_view_is_stored_with_its_picture():
    view = tokens_view(TOKENS, range(len(TOKENS)))
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "image/png"}
    assert bundle["image/png"] in bundle["text/html"]
    assert view.picture.startswith(b"\x89PNG") and len(view.picture) < 30_000


def test_a_notebook_stores_a_short_text_beside_the_html():
    view = tokens_view(TOKENS, range(len(TOKENS)))
    assert len(repr(view)) < 40
    assert view._repr_html_() == view.body


def given(view: Html) -> dict[str, Any]:
    """The data of a view, unpacked."""
    packed = re.search(r'props = "([^"]+)"', view.body)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_tokens_cannot_break_out_of_the_markup():
    tokens = ['"><script>alert(1)</script>', "&lt;"]
    view = tokens_view(tokens, [0.0, 1.0], unit='"><script>alert(2)</script>')
    assert "<script>alert" not in view.body
    assert view.body.count("<script>") == 1
    assert given(view)["tokens"][0].startswith('"><\u2060script')


@pytest.mark.parametrize(("heads", "place"), [("mean", 0), ("max", 1), (0, 2), (1, 3)])
def test_attention_begins_with_the_mean_the_maximum_or_one_head(heads, place):
    assert given(attention_view(TOKENS, attention_to(3), heads=heads))["heads"] == place


def test_the_colours_of_attention_leave_out_the_first_token():
    attention = attention_to(3)
    assert given(attention_view(TOKENS, attention))["bound"] == 0.13
    assert given(attention_view(TOKENS, attention, bound=0.5))["bound"] == 0.5


def test_values_that_are_all_zero_still_give_a_colour_scale():
    assert given(tokens_view(["a", "b"], [0.0, 0.0]))["bound"] == 1.0


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
        lambda: attention_view(["a"], torch.ones(2, 1, 1, 1), blocks=[3]),
        lambda: attention_view(["a"], torch.ones(2, 1, 1, 1), blocks=[3, 4], block=5),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match="values|attention|labels|heads|block"):
        call()


@pytest.fixture
def _no_bundle_is_kept():
    lenskit.figures.views._bundle.cache_clear()
    yield
    lenskit.figures.views._bundle.cache_clear()


@pytest.mark.usefixtures("_no_bundle_is_kept")
def test_a_circuitsvis_without_its_script_is_named(monkeypatch):
    monkeypatch.setattr(lenskit.figures.views, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"circuitsvis 1\.43\.3"):
        tokens_view(["a"], [1.0])


def test_a_circuitsvis_of_another_make_is_refused():
    with pytest.raises(RuntimeError, match=r"1\.43\.3"):
        lenskit.figures.views._fitted("var CircuitsVis = {}")
