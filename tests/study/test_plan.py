from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from io import StringIO

import families
import pytest
import tiny
import torch
from rich.console import Console
from typer.testing import CliRunner

from lenskit.capture import capture
from lenskit.cli import app
from lenskit.concepts import concepts
from lenskit.generation import generate
from lenskit.models import load_model
from lenskit.prompts import build_prompts
from lenskit.study import plan as planning
from lenskit.study.plan import failure_table, plan, plan_table, prompts_of_length

SMALL = dict(prompts=12, rows=7, max_new_tokens=4)


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(planning, "_ENOUGH_SECONDS", 0.0)


@pytest.fixture(scope="module")
def embedded():
    return load_model(device="cpu", check=False)


@contextmanager
def largest_cache(model, monkeypatch):
    """The most bytes of keys and values after any step, while no token ends an answer."""
    sizes = []

    def measure(module, arguments, output):
        layers = output.past_key_values.layers
        sizes.append(sum(part.nbytes for each in layers for part in (each.keys, each.values)))

    monkeypatch.setattr("lenskit.decoding.end_tokens", lambda model: ())
    handle = model.original_model.register_forward_hook(measure)
    try:
        yield sizes
    finally:
        handle.remove()


def held_by_a_capture(model, prompts: int) -> int:
    made = build_prompts(model, concepts["moods"]["cheerful"], number=prompts)
    found = capture(model, made, progress=False)
    return found.resid_post.nbytes + found.attention_to_prefix.nbytes


def test_memory_is_what_the_embedded_model_then_takes(embedded, monkeypatch):
    estimate = plan(embedded, 3, **SMALL)
    reference = tiny.reference_model(embedded.cfg.model_name)
    # The bridge gives every model an unembedding bias.
    bias = 4 * reference.config.vocab_size
    assert estimate.weights == reference.get_memory_footprint() + bias
    assert estimate.captured == held_by_a_capture(embedded, 12)
    questions = next(iter(next(iter(concepts.values())).values())).questions
    with largest_cache(embedded, monkeypatch) as sizes:
        generate(embedded, [questions[i % 5] for i in range(7)], max_new_tokens=4)
    assert estimate.cache == max(sizes)
    assert estimate.memory == estimate.weights + estimate.captured + estimate.cache


@pytest.mark.parametrize("architecture", ["mistral-window", "gemma3", "gpt2"])
def test_a_cache_that_forgets_is_counted_as_what_it_keeps(architecture, monkeypatch):
    model = tiny.shared_model(architecture)
    estimate = plan(model, **SMALL)
    questions = next(iter(next(iter(concepts.values())).values())).questions
    with largest_cache(model, monkeypatch) as sizes:
        generate(model, [questions[i % 5] for i in range(7)], max_new_tokens=4)
    assert estimate.cache == max(sizes)
    assert estimate.captured == held_by_a_capture(model, 12)


def test_weights_in_half_precision_take_half(embedded):
    half = load_model(device="cpu", dtype="bfloat16", check=False)
    assert plan(half, **SMALL).weights < 0.51 * plan(embedded, **SMALL).weights


def test_a_plan_adds_up(embedded):
    estimate = replace(
        plan(embedded, 10, **SMALL), capture_seconds=1.0, fit_seconds=2.0, generation_seconds=4.0
    )
    assert estimate.seconds_per_concept == 7.0 and estimate.seconds == 70.0
    assert estimate.prompts == 12 and estimate.rows == 7 and estimate.max_new_tokens == 4


def test_prompts_can_be_given_a_length(embedded):
    some = build_prompts(embedded, concepts["moods"]["cheerful"], number=4)
    closing = some.tokens.input_ids[0, -5:]
    for length in (6, 23, 400):
        made = prompts_of_length(some, length)
        assert (made.tokens.lengths == length).all()
        assert (made.tokens.input_ids[:, -5:] == closing).all()
        assert made.prefix_mask.shape == (4, length)
    assert plan(embedded, tokens_per_prompt=23, **SMALL).tokens_per_prompt == 23


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rows": 0}, "got rows=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"number_of_concepts": 0}, "number_of_concepts=0"),
        ({"prompts": 3}, "prompts must be at least 4"),
        ({"prompts": -400}, "prompts must be at least 4"),
        ({"rows": -1}, "got rows=-1"),
        ({"tokens_per_prompt": 5}, "more than the 5 closing tokens"),
        ({"tokens_per_prompt": 10**9}, "at most 512, what this model has positions for"),
    ],
)
def test_numbers_that_make_no_plan_are_refused(embedded, numbers, message):
    with pytest.raises(ValueError, match=message):
        plan(embedded, **numbers)


def test_the_table_names_every_part(embedded):
    estimate = replace(
        plan(embedded, 100, **SMALL),
        capture_seconds=1.0,
        fit_seconds=90.0,
        generation_seconds=300.0,
        weights=3 * 2**30,
    )
    console = Console(width=100, file=StringIO())
    console.print(plan_table(estimate))
    text = console.file.getvalue()
    for words in ("12 prompts of", "7 answers of 4 tokens", "6.5 min", "10.9 h", "3.0 GiB"):
        assert words in text


def test_a_plan_leaves_the_model_as_it_was():
    model = tiny.shared_model()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids)
        plan(model, **SMALL)
        assert torch.equal(model(ids), before)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_the_command_prints_the_table_and_mistakes_in_a_line():
    words = ["plan", str(tiny.shared_folder()), "--device", "cpu", "--concepts", "3"]
    small = ["--prompts", "8", "--answers", "2", "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [*words, *small])
    assert done.exit_code == 0, done.output
    assert "3 concepts" in done.output and "weights" in done.output
    wrong = CliRunner().invoke(app, [*words, "--prompts", "1"])
    assert wrong.exit_code == 1
    assert wrong.output.startswith("Error: prompts must be at least 4")


def test_a_plan_for_any_number_of_prompts_measures_few(monkeypatch):
    fitted = []

    def fit(capture, tokens, labels, **options):
        fitted.append(len(labels))

    def clock(run, device):
        run()
        return 1.0

    monkeypatch.setattr(planning, "fit_vectors", fit)
    monkeypatch.setattr(planning, "seconds_of", clock)
    model = tiny.shared_model()
    some = plan(model, prompts=10**9, rows=10**9, max_new_tokens=2)
    few = plan(model, prompts=10**6, rows=7, max_new_tokens=2)
    assert set(fitted) == {400, 200}
    assert some.captured == 1000 * few.captured
    assert some.fit_seconds == pytest.approx(1000 * few.fit_seconds)
    assert some.generation_seconds == pytest.approx(10**9 / 7 * few.generation_seconds)


def folder_with(path, template):
    return tiny.tiny_folder(path, tokenizer=tiny.tiny_tokenizer(template=template))


FAILS = {
    "no closing tokens": (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        {"prompts"},
    ),
    "refuses": ("{{ raise_exception('not today') }}", {"prompts", "cache", "generation"}),
}


@pytest.mark.parametrize("name", FAILS)
def test_what_cannot_be_measured_is_said_beside_what_can(name):
    template, parts = FAILS[name]
    model = load_model(
        tiny.shared_folder(), device="cpu", check=False, tokenizer=tiny.tiny_tokenizer()
    )
    model.tokenizer.chat_template = template
    estimate = plan(model, 3, **SMALL)
    assert {part for part, _ in estimate.failures} == parts
    assert estimate.weights > 0
    assert estimate.captured is estimate.memory is estimate.seconds is None
    assert (estimate.generation_seconds is None) == ("generation" in parts)
    console = Console(width=120, file=StringIO())
    console.print(plan_table(estimate), failure_table(estimate))
    assert "–" in console.file.getvalue() and "because" in console.file.getvalue()


@pytest.mark.parametrize("style", families.REAL_STYLES)
def test_a_model_with_a_real_models_tokenizer_has_a_plan(style):
    words = ["plan", str(families.real_style_folder(style)), "--device", "cpu", "--concepts", "3"]
    small = ["--prompts", "8", "--answers", "2", "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [*words, *small])
    assert done.exit_code == 0, done.output
    assert "3 concepts" in done.output and "–" not in done.output


def test_the_command_says_what_does_not_hold_and_ends_with_1(tmp_path):
    folder = folder_with(tmp_path, FAILS["no closing tokens"][0])
    small = ["--prompts", "8", "--answers", "2", "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, ["plan", str(folder), "--device", "cpu", *small])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "does not hold" in done.output and "candidate" in done.output
    assert "weights" in done.output


def test_a_model_without_attention_has_a_plan_of_what_it_can_do(tmp_path):
    folder = tiny.tiny_folder(tmp_path, "mamba")
    done = CliRunner().invoke(app, ["plan", str(folder), "--device", "cpu", "--prompts", "8"])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "capture" in done.output


@pytest.mark.parametrize("written", ["{}", "no json", '{"model": {"type": "odd"}}'])
def test_a_tokenizer_that_cannot_be_opened_is_a_line(tmp_path, written):
    folder = tiny.tiny_folder(tmp_path)
    (folder / "tokenizer.json").write_text(written)
    done = CliRunner().invoke(app, ["plan", str(folder), "--device", "cpu"])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert done.output.startswith("Error: ") and "tokenizer" in done.output
