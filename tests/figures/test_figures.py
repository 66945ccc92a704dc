"""Figures of small synthetic inputs: they render without warnings and show the numbers given."""

from __future__ import annotations

import subprocess
import sys
import warnings
from io import BytesIO
from itertools import product

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import same_color, to_hex
from matplotlib.figure import Figure

from lenskit import figures
from lenskit.capture import Capture
from lenskit.concepts import Concept, concepts
from lenskit.enrichment import Enrichment
from lenskit.figures.style import apart
from lenskit.labels import soft_labels
from lenskit.models import Tokens
from lenskit.prompts import PromptSet
from lenskit.scoring import Verdict
from lenskit.selector import TokenSelection, fixed_token, select_tokens
from lenskit.study import Study, Variant
from lenskit.vectors import fit_vectors

CANDIDATES = ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")
BLOCKS, HEADS, WIDTH = 4, 2, 12


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rendered(figure: Figure) -> Figure:
    figure.savefig(BytesIO(), format="png")
    return figure


def words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def small_capture(concept: Concept, prompts: int = 24) -> Capture:
    generator = torch.Generator().manual_seed(0)
    has_prefix = torch.arange(prompts) % 2 == 0
    statements = tuple(_statements(prompts))
    ids = torch.ones(prompts, 9, dtype=torch.long)
    prefix = torch.zeros(prompts, 9, dtype=torch.bool)
    prefix[has_prefix, 1:3] = True
    none = torch.full((prompts,), -1)
    known = PromptSet(concept, Tokens(ids, ids), prefix, has_prefix, CANDIDATES, statements, none)
    attention = torch.rand(prompts, BLOCKS, HEADS, len(CANDIDATES), generator=generator)
    attention = attention * has_prefix[:, None, None, None]
    resid = torch.randn(prompts, BLOCKS, len(CANDIDATES), WIDTH, generator=generator)
    return Capture(known, attention, resid, "tiny:0")


def _statements(number: int) -> list[str]:
    from lenskit.concepts import statements

    return [*statements("first")[: number // 2], *statements("second")[: number // 2]]


def small_study() -> Study:
    random = np.random.default_rng(0)
    rfm = {"labels": "soft", "learner": "rfm"}
    kinds = [
        Variant(**rfm),
        Variant(token="-1", labels="hard", learner="mean difference"),
        Variant(**rfm, blocks="top2"),
        Variant(**rfm, blocks="bottom2"),
        Variant(**rfm, blocks="top4"),
        Variant(**rfm, control="unsteered"),
    ]
    reasons = ("on concept", "neutral", "off concept", "ill formed", "unfinished", "repeating")
    rows = []
    names = [("fears", "spiders"), ("fears", "bees"), ("moods", "eager"), ("moods", "sad")]
    for (group, name), kind in product(names, kinds):
        for coefficient, question in product([0.2, 0.5, 1.0], "abcde"):
            reason = reasons[random.integers(len(reasons))]
            verdict = Verdict(int(reason == "on concept"), reason)
            rows.append(
                {"concept_class": group, "concept": name}
                | vars(kind)
                | {"coefficient": coefficient, "question": question, "answer": "…"}
                | vars(verdict)
            )
    return Study(pd.DataFrame(rows))


def enrichment(scores: list[float], alpha: float = 0.01) -> Enrichment:
    p_values = torch.ones(100, len(scores), 1, 1)
    for block, score in enumerate(scores):
        p_values[: round(100 * score), block] = 0.001
    tokens = TokenSelection(torch.zeros(len(scores), dtype=torch.long), ("x",), "")
    return Enrichment(p_values, torch.full((100, 1), 0.001), tokens, "keys", alpha)


@pytest.fixture(scope="module")
def spiders() -> Capture:
    return small_capture(concepts["fears"]["spiders"])


@pytest.fixture(scope="module")
def study() -> Study:
    return small_study()


def test_the_attention_map_shows_the_maximum_over_prompts_and_frames_the_selected_tokens(spiders):
    tokens = select_tokens(spiders)
    figure = rendered(figures.attention_map(spiders, tokens))
    expected = spiders.attention_to_prefix[::2].mean(2).amax(0)
    shown = figure.axes[0].images[0].get_array()
    assert np.allclose(shown, expected.numpy())
    frames = [(round(p.get_y() + 0.45), round(p.get_x() + 0.48)) for p in figure.axes[0].patches]
    assert frames == list(enumerate(expected.argmax(-1).tolist()))
    assert "terrified of spiders" in words(figure) and "-1\n\\n\\n" in words(figure)


def test_the_token_map_colours_each_block_by_its_token(spiders):
    selections = {"spiders": select_tokens(spiders), "last": fixed_token(spiders, -1)}
    figure = rendered(figures.selected_token_map(selections))
    image = figure.axes[0].images[0].get_array()
    legend = dict(
        zip(
            [text.get_text().split()[0] for text in figure.legends[0].get_texts()],
            [patch.get_facecolor() for patch in figure.legends[0].get_patches()],
            strict=True,
        )
    )
    for row, one in zip(image, selections.values(), strict=True):
        for cell, offset in zip(row, one.offsets.tolist(), strict=True):
            assert same_color(to_hex(cell), to_hex(legend[str(offset)]))


def test_token_shares_add_up_to_a_hundred_in_every_block(spiders):
    selections = {"a": [select_tokens(spiders), fixed_token(spiders)], "b": [fixed_token(spiders)]}
    figure = rendered(figures.selected_token_shares(selections))
    for axes in figure.axes:
        assert axes.patches
        heights = np.array([bar.get_height() for bar in axes.patches]).reshape(-1, BLOCKS)
        assert np.allclose(heights.sum(0), 100)
    assert "a (n = 2 concepts)" in words(figure)


def test_selections_among_different_candidates_are_refused(spiders):
    other = TokenSelection(torch.zeros(BLOCKS, dtype=torch.long), ("x",), "")
    with pytest.raises(ValueError, match="share their candidate tokens"):
        figures.selected_token_map({"a": select_tokens(spiders), "b": other})


def test_label_curves_fall_and_have_one_line_for_each_block(spiders):
    labels = soft_labels(spiders, select_tokens(spiders))
    figure = rendered(figures.soft_label_curves(spiders, labels))
    lines = figure.axes[0].lines
    assert len(lines) == BLOCKS
    assert all((np.diff(line.get_ydata()) <= 0).all() for line in lines)
    chosen = rendered(figures.soft_label_curves(spiders, labels, blocks=[2]))
    expected = labels[::2, 2].sort(descending=True).values.numpy()
    assert np.array_equal(chosen.axes[0].lines[0].get_ydata(), expected)


def test_the_principal_components_carry_label_and_true_activity(spiders):
    tokens = select_tokens(spiders)
    figure = rendered(
        figures.activation_pca(spiders, tokens, soft_labels(spiders, tokens), block=1)
    )
    assert "true activity, 0 to 1" in words(figure)
    truth = figure.axes[1].collections[1].get_array()
    # The rates that the model was trained on: fears are active on nature.
    assert truth.max() == pytest.approx(0.97) and len(truth) == len(spiders) // 2


def test_a_concept_of_ones_own_has_no_panel_of_true_activity():
    mine = small_capture(Concept("Like $5 and $6."))
    tokens = select_tokens(mine)
    figure = rendered(figures.activation_pca(mine, tokens, soft_labels(mine, tokens), block=0))
    assert "true activity, 0 to 1" not in words(figure)
    rendered(figures.attention_map(mine))


def test_the_enrichment_of_several_concepts_is_averaged():
    given = {
        "keys": [enrichment([0.1, 0.3]), enrichment([0.3, 0.5])],
        "windows": enrichment([0, 1]),
    }
    figure = rendered(figures.enrichment_by_block(given))
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), [20, 40])
    assert np.allclose(figure.axes[0].lines[1].get_ydata(), [0, 100])
    assert "keys" in words(figure) and "p < 0.01" in words(figure)


def test_bars_show_both_scores_of_every_row(study):
    table = study.compare()
    figure = rendered(figures.steerability_bars(table, title="by $variant"))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    expected = [*(100 * table["best"]), *(100 * table["held_out"])]
    assert np.allclose(widths, expected)


def test_rows_are_named_by_what_they_differ_in(study):
    assert figures.row_names(study.compare()) == [
        "attention-guided token, soft labels, RFM, all blocks",
        "token -1, hard labels, mean difference, all blocks",
        "attention-guided token, soft labels, RFM, blocks top2",
        "attention-guided token, soft labels, RFM, blocks bottom2",
        "attention-guided token, soft labels, RFM, blocks top4",
        "unsteered",
    ]
    assert figures.row_names(study.compare(["token"])) == ["attention-guided token", "token -1"]
    assert figures.row_names(study.compare(["concept_class", "labels"])) == 2 * [
        "soft labels",
        "hard labels",
    ]


def test_one_concept_has_bars_without_errors(study):
    one = Study(study.answers[study.answers["concept"] == "bees"])
    rendered(figures.steerability_bars(one.compare(["token"])))
    rendered(figures.steerability_by_class(one.compare(["concept_class", "token"])))


def test_each_class_has_a_mark_for_each_series_and_score(study):
    table = study.compare(["concept_class", "token"])
    figure = rendered(figures.steerability_by_class(table))
    shown = sorted(float(x) for box in figure.axes[0].containers for x in box.lines[0].get_xdata())
    assert np.allclose(shown, sorted(100 * np.concatenate([table["best"], table["held_out"]])))
    ticks = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    number = table["concepts"].max()
    assert ticks == {f"fears\nn = {number}", f"moods\nn = {number}"}
    places = [y for box in figure.axes[0].containers for y in box.lines[0].get_ydata()]
    assert len(set(np.round(places, 6))) == len(places)  # no two error bars coincide


def test_reasons_are_stacked_to_a_hundred_percent(study):
    steered = study.answers[study.answers["control"] == ""]
    figure = rendered(figures.over_steering(steered))
    bars = figure.axes[0].patches
    tops = {}
    for bar in bars:
        tops[bar.get_x()] = max(tops.get(bar.get_x(), 0), bar.get_y() + bar.get_height())
    assert len(tops) == 3 and list(tops.values()) == pytest.approx([100] * 3)
    assert "n = 100 answers at each" in words(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "on concept"


def test_steered_blocks_are_compared_by_their_number(study):
    table = study.compare(["blocks"])
    figure = rendered(figures.blocks_compared(table, title="blocks"))
    top = figure.axes[1].containers[0].lines[0]
    means = table.set_index("blocks")["held_out"]
    assert np.round(top.get_xdata()).tolist() == [0, 1] and not top.get_linestyle().strip("None")
    beside = [box.lines[0].get_xdata()[0] for box in figure.axes[1].containers]
    assert len(set(beside)) == len(beside)
    assert np.allclose(top.get_ydata(), 100 * means[["top2", "top4"]])
    assert "least enriched" in words(figure) and "all blocks" in words(figure)


def test_lines_by_block_are_means_with_a_band_and_leave_out_what_is_no_number():
    values = torch.tensor([[0.0, 1.0, 2.0], [1.0, float("nan"), 4.0]])
    figure = rendered(figures.by_block({"a": values, "b": values[0]}, label="x", chance=0.5))
    lines = figure.axes[0].lines
    assert np.allclose(lines[0].get_ydata(), [0.5, 1.0, 3.0])
    assert np.allclose(lines[1].get_ydata(), [0.0, 1.0, 2.0])
    assert len(figure.axes[0].collections) == 1  # a single row has no band
    assert "n = 1 to 2" in words(figure) and "chance" in words(figure)


@pytest.mark.parametrize("values", [{}, {"a": torch.zeros(3), "b": torch.zeros(2, 4)}])
def test_lines_of_different_numbers_of_blocks_are_refused(values):
    with pytest.raises(ValueError, match="values must be .block. or .row, block. of as many"):
        figures.by_block(values, label="x")


def test_projections_are_counted_by_prefix_and_true_activity(spiders):
    tokens = select_tokens(spiders)
    vectors = fit_vectors(spiders, tokens, learner="mean difference", progress=False)
    figure = rendered(figures.projection_histogram(spiders, tokens, vectors, block=2))
    counts = [sum(bar.get_height() for bar in bars) for bars in figure.axes[0].containers]
    assert sum(counts) == len(spiders) and counts[0] == 12 and len(counts) == 3
    truth = torch.ones(len(spiders))
    figure = figures.projection_histogram(spiders, tokens, vectors, block=2, activity=truth)
    assert "active\n(n = 12)" in words(figure) and "inactive\n(n = 0)" in words(figure)
    stream = tokens.take(spiders.resid_post)[:, 2] @ vectors.directions[2] / vectors.resid_norm[2]
    edges = [bar.get_x() for bar in figure.axes[0].containers[0]]
    assert np.isclose(min(edges), float(stream.min()), atol=1e-5)


def test_projections_on_vectors_or_blocks_that_do_not_fit_are_refused(spiders):
    tokens = select_tokens(spiders)
    each = fit_vectors(spiders, "each", learner="mean difference", progress=False)
    with pytest.raises(ValueError, match="one for each block"):
        figures.projection_histogram(spiders, tokens, each, block=0)
    vectors = fit_vectors(spiders, tokens, learner="mean difference", progress=False)
    with pytest.raises(ValueError, match="block must be from 0 to 3, got 4"):
        figures.projection_histogram(spiders, tokens, vectors, block=4)


def test_labels_are_moved_apart_and_keep_their_order():
    places = apart([0.0, 0.1, 0.1, 5.0, 9.9, 10.0], gap=1.0, low=0.0, high=10.0)
    assert np.diff(places).min() >= 1 - 1e-9
    assert places[3] == 5.0 and places[0] == 0.0 and places[-1] == 10.0


def test_figures_leave_no_setting_behind(spiders):
    before = dict(matplotlib.rcParams.copy())
    rendered(figures.attention_map(spiders))
    assert dict(matplotlib.rcParams.copy()) == before


DRAWS = """
import sys
import pandas as pd
from lenskit.figures import over_steering
answers = pd.DataFrame({"coefficient": [0.1, 0.2], "reason": ["neutral", "repeating"]})
over_steering(answers).savefig(sys.argv[1])
sys.exit("matplotlib.pyplot" in sys.modules)
"""


def test_figures_are_drawn_and_saved_without_pyplot(tmp_path):
    done = subprocess.run([sys.executable, "-c", DRAWS, str(tmp_path / "a.png")], check=False)
    assert done.returncode == 0 and (tmp_path / "a.png").stat().st_size > 1000


def test_all_nulls_are_read_at_one_level_with_its_line_of_chance():
    given = {"keys": enrichment([0.1, 0.3]), "windows": enrichment([0.2, 0.1], alpha=0.05)}
    figure = rendered(figures.enrichment_by_block(given))
    assert "p < 0.05" in words(figure) and "p < 0.01" not in words(figure)
    assert figure.axes[0].lines[-1].get_ydata()[0] == pytest.approx(5)
    assert "chance" in words(figure)
    assert "p < 0.2" in words(figures.enrichment_by_block(given, alpha=0.2))


def test_every_figure_of_one_panel_draws_on_axes_of_ones_own(spiders, study):
    tokens = select_tokens(spiders)
    labels = soft_labels(spiders, tokens)
    fitted = fit_vectors(spiders, tokens, learner="mean difference", progress=False)
    draw = {
        "attention": lambda ax: figures.attention_map(spiders, tokens, ax=ax),
        "tokens": lambda ax: figures.selected_token_map({"a": tokens}, ax=ax),
        "labels": lambda ax: figures.soft_label_curves(spiders, labels, ax=ax),
        "enrichment": lambda ax: figures.enrichment_by_block({"a": enrichment([0.1])}, ax=ax),
        "bars": lambda ax: figures.steerability_bars(study.compare(["token"]), ax=ax),
        "classes": lambda ax: figures.steerability_by_class(
            study.compare(["concept_class", "token"]), ax=ax
        ),
        "reasons": lambda ax: figures.over_steering(study.answers, ax=ax),
        "lines": lambda ax: figures.by_block({"a": torch.rand(2, 3)}, label="x", ax=ax),
        "projections": lambda ax: figures.projection_histogram(
            spiders, tokens, fitted, block=1, ax=ax
        ),
    }
    figure = Figure(figsize=(30, 14), layout="constrained")
    for ax, one in zip(figure.subplots(3, 3).flat, draw.values(), strict=False):
        assert one(ax) is figure
        assert ax.has_data()
    rendered(figure)


def test_every_figure_has_an_alternative_text(spiders, study):
    tokens = select_tokens(spiders)
    made = [
        figures.attention_map(spiders, tokens),
        figures.selected_token_map({"a": tokens}),
        figures.selected_token_shares({"a": [tokens]}),
        figures.soft_label_curves(spiders, soft_labels(spiders, tokens)),
        figures.activation_pca(spiders, tokens, soft_labels(spiders, tokens), block=1),
        figures.enrichment_by_block({"a": enrichment([0.1, 0.2])}),
        figures.steerability_bars(study.compare()),
        figures.steerability_by_class(study.compare(["concept_class", "token"])),
        figures.over_steering(study.answers),
        figures.blocks_compared(study.compare(["blocks"])),
        figures.by_block({"a": torch.rand(2, 3)}, label="rank correlation"),
        figures.projection_histogram(
            spiders, tokens, fit_vectors(spiders, tokens, progress=False), block=1
        ),
    ]
    for figure in made:
        shown, metadata = figure._repr_mimebundle_()
        assert len(metadata["image/png"]["alt"]) > 20 and shown["image/png"]
        assert "n = " in words(figure) or "over 12 prompts" in words(figure)
