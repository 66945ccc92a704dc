"""Pictures of the experiments, from small tables with the columns that the experiments write."""

from __future__ import annotations

import re
import warnings
from io import BytesIO

import matplotlib
import numpy as np
import pandas as pd
import pytest
from commanded import lenskit
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from lenskit import figures
from lenskit.figures import DRAWINGS, draw_experiment, read_table, save_figure
from lenskit.figures.style import BLUE, GREY, PALE, SKY

SCORES = ("best", "held out", "one coefficient", "same divergence", "steerable")
CONTROLS = {
    "unsteered": "unsteered",
    "prefix in the prompt": "prompted",
    "random vector": "random vector",
}


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def table_of(ways, measures=SCORES, classes=("all", "fears", "moods"), reference=None, **columns):
    """A row for each class, way and measure, as ``Experiment.table`` has them."""
    draw, rows = np.random.default_rng(0), []
    first = next(iter(ways)) if reference is None else reference
    for of in classes:
        for way, own in ways.items():
            for measure in measures:
                mean = round(float(draw.uniform(0.3, 0.7)), 3)
                same = way == first
                rows.append(
                    {"concept_class": of, "way": way, "measure": measure, "mean": mean}
                    | {"low": mean - 0.1, "high": mean + 0.2}
                    | {"difference": 0.0 if same else round(mean - 0.5, 3)}
                    | {"difference_low": mean - 0.6, "difference_high": mean - 0.4}
                    | {"concepts": 12 if of == "all" else 6, "reference": first}
                    | {"control": CONTROLS.get(way, "")}
                    | own
                )
    return pd.DataFrame(rows)


def controls(columns):
    return {way: dict.fromkeys(columns) for way in CONTROLS}


def tokens_table():
    ways = {"token by attention": {"token": "attention", "blocks": "all"}}
    ways |= {f"token -{i}": {"token": f"-{i}", "blocks": "all"} for i in (1, 2)}
    return table_of(ways | controls(["token", "blocks"]))


def labels_table():
    ways = {
        f"{kind}, {learner}, {number} prompts": {
            **{"labels": kind, "learner": learner, "prompts": number}
        }
        for number in (80, 8)
        for learner in ("covariance", "ridge")
        for kind in ("hard", "soft")
    }
    return table_of(ways | controls(["labels", "learner", "prompts"]))


def blocks_table():
    ways = {"all blocks": {"chosen by": "all", "k": 8}}
    for k in (1, 2, 4):
        for by in ("top by enrichment", "top by logit lens", "bottom by enrichment", "random"):
            word, _, rest = by.partition(" ")
            ways[f"{word} {k} {rest}".strip()] = {"chosen by": by, "k": k}
        ways |= {f"{by} {k}": {"chosen by": by, "k": k} for by in ("early", "middle", "late")}
    ways |= {"block 0": {"chosen by": "alone", "k": 1}}
    return table_of(ways | controls(["chosen by", "k"]))


def ranking_table():
    ways = {"enrichment": {}, "logit lens": {}}
    return table_of(ways, ["rank correlation"]).drop(columns=["control"])


def cost_table():
    ways = {
        f"{recipe}, {number} prompts": {"recipe": recipe, "prompts": number}
        for number in (80, 8)
        for recipe in ("covariance", "ridge")
    }
    found = table_of(ways | controls(["recipe", "prompts"]))
    spent = table_of(ways | controls(["recipe", "prompts"]), ["seconds", "forward passes"])
    passes = spent["measure"] == "forward passes"
    spent.loc[passes, "mean"] = spent.loc[passes, "prompts"].astype(float)
    return pd.concat([found, spent], ignore_index=True)


def proxy_table():
    ways = {"Eq. 4, median": {}, "one head, chosen elsewhere": {}, "gating head": {}}
    return table_of(ways, ["AUROC", "rank correlation"]).drop(columns=["control"])


def classes_tables():
    ways = {"the recipe": {}, "each closing token its own vector": {}}
    shares = [
        {"concept_class": of, "way": "the recipe", "coefficient": when, "reason": reason}
        | {"share": share, "answers": 30}
        for of in ("all", "fears", "moods")
        for when in ("same divergence", "best coefficient")
        for reason, share in (("on concept", 0.6), ("None", 0.1), ("repeating", 0.3))
    ]
    predictors = pd.DataFrame(
        {
            "measured": ["agreement of differences", "prefix tokens", "p value of gating"],
            "rank correlation": [0.6, -0.2, np.nan],
            "concepts": [12, 12, 0],
        }
    )
    return table_of(ways | controls([])), pd.DataFrame(shares), predictors


def failures_tables():
    ways = {"as it should be": {}, "wrong sign": {}, "too much": {}}
    found = table_of(ways | controls([]), (*SCORES, "named rightly", "unchanged", "repeated"))
    causes = pd.DataFrame(
        [
            ("as it should be", "works", "works", 0.75),
            ("as it should be", "works", "unknown", 0.25),
            ("wrong sign", "wrong sign", "wrong sign", 1.0),
            ("too much", "too much", "too little", 1.0),
        ],
        columns=["way", "expected", "cause", "share"],
    )
    return found, causes


def sizes_tables():
    blocks = pd.DataFrame(
        [
            {"concept_class": of, "model": model, "block": block}
            | {"relative depth": block / (number - 1), "measure": measure}
            | {"mean": 0.5, "low": 0.4, "high": 0.7, "concepts": 12}
            for of in ("all", "fears")
            for model, number in (("4 blocks", 4), ("8 blocks", 8))
            for measure in ("enrichment", "selected token", "gating AUROC")
            for block in range(number)
        ]
    )
    summary = table_of({"4 blocks": {}, "8 blocks": {}}, ["prompted", "gates"])
    return blocks, summary.drop(columns=["control"])


def ablation_table():
    return pd.DataFrame(
        [
            {"model": model, "measure": measure, "value": 0.5}
            for model in ("no competition", "competition, price")
            for measure in ("prompted", "gating label, AUROC")
        ]
    )


def tasks_table():
    """As tables of tasks are: prompts are counted, and tasks stand in the place of classes."""
    measures = ["profiled", "not profiled", "score", "together", "alone", "without"]
    found = table_of({"nothing": {}, "PASTA": {}}, measures)
    return found.rename(columns={"concept_class": "task", "concepts": "n"})


def rendered(figure: Figure) -> Figure:
    figure.savefig(BytesIO(), format="png")
    return figure


def words(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def bars_of(axes) -> list[list]:
    return [list(each) for each in axes.containers if isinstance(each, BarContainer)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the tables of every experiment."""
    folder = tmp_path_factory.mktemp("results")
    classes, reasons, predictors = classes_tables()
    failed, causes = failures_tables()
    blocks, summary = sizes_tables()
    tables = {
        **{"tokens": tokens_table(), "labels": labels_table(), "blocks": blocks_table()},
        **{"blocks-ranking": ranking_table(), "cost": cost_table(), "proxy": proxy_table()},
        **{"classes": classes, "classes-reasons": reasons, "classes-predictors": predictors},
        **{"failures": failed, "failures-causes": causes},
        **{"sizes": summary, "sizes-by-block": blocks, "ablation": ablation_table()},
    }
    for name in ("learners", "open-prefix", "where", "beyond-text", "recipe", "main"):
        tables[name] = tokens_table()
    for name in ("policies", "field", "sources", "heads", "composition"):
        tables[name] = tasks_table()
    tables["loop"] = table_of({"always": {}, "below the band": {}}, ["score", "less fluent"])
    tables |= {"diagnosis": causes, "diagnosis-rightly": failed}
    assert {drawing.of for drawing in DRAWINGS.values()} <= set(tables)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.mark.parametrize("name", list(DRAWINGS))
def test_every_experiment_is_drawn_from_its_saved_tables_and_says_n(saved, name):
    figure = rendered(draw_experiment(name, saved))
    said = words(figure)
    assert figure.alt and DRAWINGS[name].title in said
    if name not in ("ablation",):
        assert "n = " in said and "interval" in said


def test_bars_have_the_numbers_and_intervals_given_and_controls_are_grey_and_last():
    table = tokens_table()
    figure = rendered(figures.ways_compared(table))
    axes, beside = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["token by attention", "token -1", "token -2", *CONTROLS]
    own = table[table.concept_class == "all"].set_index(["way", "measure"])["mean"]
    pale, dark = bars_of(axes)
    for kind, bars in (("best", pale), ("held out", dark)):
        assert [bar.get_width() for bar in bars] == pytest.approx([own[n, kind] for n in names])
    colours = [[to_hex(bar.get_facecolor()).upper() for bar in bars] for bars in (pale, dark)]
    assert colours == [[SKY] * 3 + [PALE] * 3, [BLUE] * 3 + [GREY] * 3]
    segments = [line.get_segments() for line in axes.collections]
    first = own["token by attention", "best"]
    assert segments[0][0][:, 0].tolist() == pytest.approx([first - 0.1, first + 0.2])
    assert "paired difference" in beside.get_title(loc="left")
    assert "to «token by attention»" in words(figure) and "n = 12 concepts" in words(figure)


def test_differences_whose_interval_holds_zero_are_hollow_and_the_reference_has_none():
    table = tokens_table()
    at = (table.way == "token -1") & (table.measure == "held out")
    table.loc[at, ["difference", "difference_low", "difference_high"]] = (0.3, 0.1, 0.5)
    at = (table.way == "token -2") & (table.measure == "held out")
    table.loc[at, ["difference", "difference_low", "difference_high"]] = (0.1, -0.1, 0.5)
    beside = figures.ways_compared(table).axes[1]
    marks = [line for line in beside.lines if line.get_marker() == "o"]
    faces = {round(float(line.get_ydata()[0])): line.get_markerfacecolor() for line in marks}
    assert 0 not in faces and faces[1] == BLUE and faces[2] == "white"


def test_some_ways_one_class_and_other_measures_can_be_asked_for():
    figure = figures.ways_compared(
        tokens_table(), ways=["token -1", "unsteered"], concept_class="fears", beside=["steerable"]
    )
    assert "n = 6 fears concepts" in words(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes[2:]] == ["steerable"]
    for options, said in (
        ({"ways": ["token 9"]}, "'token 9' is not among the ways"),
        ({"concept_class": "places"}, "concept_class='places' is not in the table"),
        ({"measures": ["speed"]}, "none of the measures speed"),
        ({"by": "learner"}, "no column learner"),
    ):
        with pytest.raises(ValueError, match=said):
            figures.ways_compared(tokens_table(), **options)


def test_labels_have_a_column_for_each_learner_and_a_line_for_each_label():
    table = labels_table()
    figure = rendered(figures.labels_by_prompts(table))
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["covariance", "ridge"]
    own = table[(table.concept_class == "all") & (table.measure == "held out")]
    hard = own[(own.labels == "hard") & (own.learner == "covariance")].sort_values("prompts")
    line = next(line for line in figure.axes[0].lines if len(line.get_ydata()) == 2)
    assert line.get_ydata() == pytest.approx(hard["mean"].to_numpy())
    assert {"prefix in the prompt", "hard", "soft", "8", "80"} <= set(words(figure).split(" | "))
    with pytest.raises(ValueError, match="no column labels"):
        figures.labels_by_prompts(proxy_table())
    with pytest.raises(ValueError, match="measure='speed' is not in the table"):
        figures.labels_by_prompts(table, measure="speed")


def test_blocks_have_a_curve_over_k_for_each_choice_and_the_ranking_beside():
    table = blocks_table()
    figure = rendered(figures.blocks_by_number(table, ranking_table()))
    assert len(figure.axes) == 3
    own = table[(table.concept_class == "all") & (table.measure == "held out")]
    top = own[own["chosen by"] == "top by enrichment"].sort_values("k")["mean"].to_numpy()
    line = next(line for line in figure.axes[0].lines if len(line.get_ydata()) == 3)
    assert line.get_ydata() == pytest.approx(top)
    assert "logit lens" in [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(figures.blocks_by_number(table).axes) == 2
    with pytest.raises(ValueError, match="no way that steers some of the blocks"):
        figures.blocks_by_number(table[table["chosen by"] == "all"])


def test_the_frontier_joins_what_nothing_reaches_as_cheaply():
    table = cost_table()
    own = (table.concept_class == "all") & (table.measure == "held out") & (table.recipe.notna())
    for recipe, number, score in (
        *(("covariance", 8, 0.5), ("covariance", 80, 0.6)),
        *(("ridge", 8, 0.3), ("ridge", 80, 0.4)),
    ):
        table.loc[own & (table.recipe == recipe) & (table.prompts == number), "mean"] = score
    figure = rendered(figures.cost_frontier(table))
    broad = next(line for line in figure.axes[0].lines if line.get_linewidth() == 6)
    assert broad.get_xdata().tolist() == [8, 80] and broad.get_ydata().tolist() == [0.5, 0.6]
    with pytest.raises(ValueError, match="neither forward passes nor seconds"):
        figures.cost_frontier(table[table.measure == "held out"])


def test_reasons_fill_each_classs_bar_and_predictors_have_fishers_interval():
    table, reasons, predictors = classes_tables()
    figure = rendered(figures.classes_compared(table, reasons, predictors))
    scores, why, told = figure.axes
    assert [label.get_text() for label in scores.get_yticklabels()][0] == "all (n = 12)"
    totals = np.sum([[bar.get_width() for bar in bars] for bars in bars_of(why)], axis=0)
    assert totals == pytest.approx([1, 1, 1])
    assert len(told.get_yticklabels()) == 2
    half = 1.96 * np.sqrt(1.06 / 9)
    expected = [np.tanh(np.arctanh(0.6) - half), np.tanh(np.arctanh(0.6) + half)]
    segments = [s for c in told.collections for s in c.get_segments()]
    assert segments[0][:, 0].tolist() == pytest.approx(expected)
    assert len(figures.classes_compared(table).axes) == 1


def test_causes_are_framed_where_they_are_right():
    table, causes = failures_tables()
    figure = rendered(figures.causes_named(causes, table))
    axes = figure.axes[0]
    faults = [label.get_text() for label in axes.get_yticklabels()]
    names = [label.get_text() for label in axes.get_xticklabels()]
    framed = [(p.get_x() + 0.5, p.get_y() + 0.5) for p in axes.patches]
    assert [(names[int(x)], faults[int(y)]) for x, y in framed] == [
        *(("works", "as it should be"), ("wrong sign", "wrong sign"), ("too much", "too much"))
    ]
    assert axes.images[0].get_array()[0, names.index("unknown")] == 0.25
    # Rows of single classes have fewer concepts, which are not those of the picture.
    fewer = table.assign(concept_class="fears", concepts=1)
    with_classes = figures.causes_named(causes, pd.concat([table, fewer]))
    assert with_classes.axes[0].get_title("left") == axes.get_title("left")
    assert "too much 0 %" in figure.alt


def test_depth_has_a_panel_for_each_measure_and_a_line_for_each_model():
    blocks, summary = sizes_tables()
    figure = rendered(figures.depth_by_size(blocks, summary))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["enrichment", "selected token", "gating AUROC"]
    assert titles[3:5] == ["answers", "attention and depth"]
    lengths = [len(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert lengths == [4, 8]
    many = pd.concat([blocks[blocks.model == "4 blocks"].assign(model=str(i)) for i in range(12)])
    rendered(figures.depth_by_size(many))


def test_the_ablation_has_intervals_where_its_table_has_them():
    table = ablation_table()
    assert "keeps neither n nor intervals" in words(figures.ablation_compared(table))
    more = table.assign(low=0.4, high=0.7, concepts=15)
    figure = rendered(figures.ablation_compared(more))
    assert "n = 15 concepts" in words(figure)
    segments = figure.axes[0].collections[0].get_segments()
    assert segments[0][:, 0].tolist() == pytest.approx([0.4, 0.7])


def test_words_of_a_saved_table_stay_words(tmp_path):
    pd.DataFrame(
        {"way": ["a", "b"], "token": ["-1", ""], "reason": ["None", "nan"], "k": [1, None]}
    ).to_csv(tmp_path / "t.csv", index=False)
    found = read_table(tmp_path / "t.csv")
    assert list(found.token) == ["-1", ""] and list(found.reason) == ["None", "nan"]
    assert found.k[0] == 1 and np.isnan(found.k[1])


def test_files_are_the_same_bytes_at_every_run(tmp_path, saved):
    first = save_figure(draw_experiment("tokens", saved), tmp_path / "one" / "tokens")
    second = save_figure(draw_experiment("tokens", saved), tmp_path / "two" / "tokens")
    assert [path.name for path in first] == ["tokens.svg", "tokens.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    text = first[0].read_text(encoding="utf-8")
    assert "<dc:date>" not in text and "held out of 6 ways" in text
    clips = set(re.findall(r'clipPath id="(\w+)"', text))
    assert clips and clips == {f"clip{i}" for i in range(len(clips))}
    assert set(re.findall(r"url\(#(\w+)\)", text)) == clips


def test_the_command_draws_what_is_there_and_says_what_is_missing(tmp_path, saved):
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "own").mkdir(parents=True)
    (results / "tokens.csv").write_bytes((saved / "tokens.csv").read_bytes())
    (results / "own" / "proxy.csv").write_bytes((saved / "proxy.csv").read_bytes())
    done = lenskit("figures", "--results", results, "--out", out)
    assert done.exit_code == 0, done.output
    names = {path.name for path in out.iterdir()} - {"ablation.svg", "ablation.png"}
    assert names == {f"{name}.{end}" for name in ("tokens", "proxy") for end in ("svg", "png")}
    # A long path breaks anywhere at the end of a line.
    said = "".join(done.stdout.split())
    command = f"`lenskit experiment cost --out {results}`"
    assert "".join(f"cost: there is no cost.csv; run {command}".split()) in said
    assert "`python-mbenchmarks.diagnosis--out" in said
    refused = lenskit("figures", "--results", tmp_path / "nowhere")
    assert refused.exit_code == 1 and "is no folder" in refused.stderr
    with pytest.raises(KeyError, match="there is no picture 'token'"):
        draw_experiment("token", saved)
    with pytest.raises(FileNotFoundError, match="is not there"):
        draw_experiment("cost", results)
