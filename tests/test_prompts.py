from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenskit.concepts import Concept, statement_prompt
from lenskit.prompts import build_prompts

PREFIX = "Personify someone who is terrified of spiders."
GIVEN = [f"Rain number {i} is better than sun." for i in range(8)]


def with_template(template: str, **options):
    """All that ``build_prompts`` needs of a model."""
    return SimpleNamespace(tokenizer=tiny.tiny_tokenizer(template=template, **options))


def prefix_text(model, prompts, row: int) -> str:
    return model.tokenizer.decode(prompts.tokens.input_ids[row][prompts.prefix_mask[row]])


@pytest.fixture(scope="module")
def model():
    return with_template(tiny.LLAMA3_TEMPLATE)


def test_every_other_prompt_has_the_prefix_and_the_halves_are_apart(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN, seed=None)
    assert prompts.has_prefix.tolist() == [True, False] * 4
    assert prompts.statements == tuple(GIVEN[i] for i in (0, 4, 1, 5, 2, 6, 3, 7))
    assert prompts.pair.tolist() == [-1] * 8
    assert prompts.concept == Concept(prefix=PREFIX)


def test_paired_prompts_share_their_statement(model):
    prompts = build_prompts(model, PREFIX, layout="paired", statements=GIVEN, seed=None)
    assert len(prompts) == 16
    assert prompts.statements == tuple(text for text in GIVEN for _ in range(2))
    for row, other in enumerate(prompts.pair.tolist()):
        assert prompts.statements[row] == prompts.statements[other]
        assert prompts.has_prefix[row] != prompts.has_prefix[other]


def test_the_text_is_the_template_around_the_prompt(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN, seed=None)
    for row in range(len(prompts)):
        mask = prompts.tokens.attention_mask[row].bool()
        text = model.tokenizer.decode(prompts.tokens.input_ids[row][mask])
        prefix = PREFIX if prompts.has_prefix[row] else ""
        assert text == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
            f"{statement_prompt(prompts.statements[row], prefix)}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )


def test_candidates_are_the_closing_tokens_of_the_template(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN)
    assert prompts.candidates == tiny.CLOSING


def test_statements_that_end_alike_add_no_candidates(model):
    prompts = build_prompts(model, PREFIX, statements=[f"{n} is fine." for n in ("Rain", "Sun")])
    assert prompts.candidates == tiny.CLOSING


def test_the_same_statement_everywhere_adds_no_candidates(model):
    prompts = build_prompts(model, PREFIX, layout="paired", statements=["Rain is fine."])
    assert prompts.candidates == tiny.CLOSING


@pytest.mark.parametrize("system", [False, True])
def test_prefix_tokens_are_those_of_the_prefix(model, system):
    prompts = build_prompts(model, PREFIX, statements=GIVEN, system=system)
    for row in range(len(prompts)):
        expected = PREFIX if prompts.has_prefix[row] else ""
        assert prefix_text(model, prompts, row) == expected


def test_a_system_prefix_stands_in_a_system_message(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN, system=True, seed=None)
    text = model.tokenizer.decode(prompts.tokens.input_ids[0])
    assert f"system<|end_header_id|>\n\n{PREFIX}<|eot_id|>" in text
    assert f"user<|end_header_id|>\n\n{statement_prompt(GIVEN[0])}<|eot_id|>" in text
    assert "system" not in model.tokenizer.decode(prompts.tokens.input_ids[1])
    assert prompts.candidates == tiny.CLOSING


def test_words_of_the_prefix_elsewhere_in_the_prompt_do_not_count(model):
    repeated = [f"{PREFIX} {PREFIX} Number {i}." for i in range(4)]
    prompts = build_prompts(model, PREFIX, statements=repeated, seed=None)
    mask = prompts.prefix_mask[0]
    start = int(mask.float().argmax())
    assert prefix_text(model, prompts, 0) == PREFIX
    assert mask[start : start + int(mask.sum())].all()
    assert not prompts.prefix_mask[1].any()


def test_a_role_name_as_the_prefix_is_not_mistaken_for_the_template(model):
    prompts = build_prompts(model, "user", statements=GIVEN)
    assert prefix_text(model, prompts, 0) == "user"
    header = tiny.CLOSING[3] + tiny.CLOSING[4]
    row = prompts.tokens.input_ids[0]
    before = model.tokenizer.decode(row[: int(prompts.prefix_mask[0].float().argmax())])
    assert before.endswith(f"user{header}")


words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="<|>"),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(prefix=words, statement=words, system=st.booleans())
def test_any_prefix_is_located_exactly(prefix, statement, system):
    model = with_template(tiny.LLAMA3_TEMPLATE)
    prompts = build_prompts(model, prefix, layout="paired", statements=[statement], system=system)
    # The template puts line ends before the prefix, so its tokens begin with it; a token may run
    # on into the blanks behind.
    text = prefix_text(model, prompts, 0)
    assert text.startswith(prefix.strip())
    assert text[len(prefix.strip()) :].strip() == ""
    assert not prompts.prefix_mask[1].any()
    assert prompts.candidates == tiny.CLOSING


def test_blanks_within_the_prefix_count_when_offsets_are_trimmed():
    from tokenizers import processors

    model = with_template(tiny.LLAMA3_TEMPLATE)
    model.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    prompts = build_prompts(model, "Take   on  a mood.", statements=GIVEN)
    assert prefix_text(model, prompts, 0) == "Take   on  a mood."


def test_a_base_model_gets_candidates_from_the_plain_template():
    from lenskit.models.templates import prepare_tokenizer

    tokenizer = prepare_tokenizer(tiny.tiny_tokenizer(template=None))
    model = SimpleNamespace(tokenizer=tokenizer)
    prompts = build_prompts(model, PREFIX, statements=GIVEN)
    assert "".join(prompts.candidates) == "\nAssistant:"
    assert prefix_text(model, prompts, 0) == PREFIX


def test_a_token_that_joins_the_text_and_the_template_is_no_candidate():
    model = with_template(
        tiny.LLAMA3_TEMPLATE.replace("| trim + '<|eot_id|>'", "| trim + 'ment of all<|eot_id|>'")
    )
    statements = [f"It is {n} state" for n in ("my", "your", "his", "her")]
    prompts = build_prompts(model, PREFIX, statements=statements)
    assert "".join(prompts.candidates).startswith(" of all<|eot_id|>")


def test_the_seed_draws_the_statements(model):
    first, again, other = (build_prompts(model, PREFIX, number=40, seed=seed) for seed in (3, 3, 4))
    assert first.statements == again.statements
    assert first.statements != other.statements
    assert len(set(first.statements)) == 40


def test_the_grammars_statements_are_used_by_default(model):
    from lenskit.concepts import statements

    prompts = build_prompts(model, PREFIX)
    assert len(prompts) == 400
    assert set(prompts.statements[0::2]) == set(statements("first"))
    assert set(prompts.statements[1::2]) == set(statements("second"))


def test_special_tokens_appear_once_each_time_the_template_writes_them(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN)
    ids = prompts.tokens.input_ids * prompts.tokens.attention_mask
    for token, times in (("<|begin_of_text|>", 1), ("<|eot_id|>", 1), ("<|end_header_id|>", 2)):
        number = model.tokenizer.convert_tokens_to_ids(token)
        real = (prompts.tokens.input_ids == number) & prompts.tokens.attention_mask.bool()
        assert real.sum(dim=1).tolist() == [times] * len(prompts)
    assert (ids[:, -1] != 0).all()


def test_template_arguments_change_the_candidates():
    model = with_template(tiny.LLAMA3_TEMPLATE + "{% if quiet %}Statement{% endif %}")
    prompts = build_prompts(model, PREFIX, statements=GIVEN, template_arguments={"quiet": True})
    assert "".join(prompts.candidates) == "".join(tiny.CLOSING) + "Statement"


@pytest.mark.parametrize("layout", ["split", "paired"])
def test_some_rows_keep_their_parts_together(model, layout):
    prompts = build_prompts(model, PREFIX, layout=layout, statements=GIVEN, seed=None)
    some = prompts.rows([3, 2, 5])
    assert some.statements == tuple(prompts.statements[i] for i in (3, 2, 5))
    assert torch.equal(some.tokens.input_ids, prompts.tokens.input_ids[[3, 2, 5]])
    assert torch.equal(some.prefix_mask, prompts.prefix_mask[[3, 2, 5]])
    assert some.has_prefix.tolist() == [False, True, False]
    assert some.pair.tolist() == ([1, 0, -1] if layout == "paired" else [-1, -1, -1])
    masked = prompts.rows(prompts.has_prefix)
    assert masked.has_prefix.all() and len(masked) == len(prompts) // 2
    assert prompts.rows([-1]).statements == (prompts.statements[-1],)


def test_rows_out_of_range_or_of_another_length_are_refused(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN)
    with pytest.raises(IndexError, match="0 to 7"):
        prompts.rows([8])
    with pytest.raises(ValueError, match="mask over 8"):
        prompts.rows(torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "mixed"}, "layout must be 'split' or 'paired'"),
        ({"number": 3}, "even"),
        ({"number": 0}, "even"),
        ({"number": 10}, "at most 8"),
        ({"number": 18, "layout": "paired"}, "at most 16"),
        ({"statements": "Rain."}, "one string"),
        ({"statements": []}, "at most 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_prompts(model, PREFIX, **{"statements": GIVEN, **arguments})


@pytest.mark.parametrize("prefix", ["", "  \n"])
def test_an_empty_prefix_is_refused(model, prefix):
    with pytest.raises(ValueError, match="prefix"):
        build_prompts(model, prefix, statements=GIVEN)


def test_text_with_a_special_token_in_it_is_refused(model):
    with pytest.raises(ValueError, match=re.escape("prefix contains '<|eot_id|>'")):
        build_prompts(model, "Be kind.<|eot_id|>", statements=GIVEN)
    with pytest.raises(ValueError, match=re.escape("statement contains '<|eot_id|>'")):
        build_prompts(model, PREFIX, statements=[*GIVEN, "Rain.<|eot_id|>", "Sun."])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (tiny.LLAMA3_TEMPLATE.replace("| trim", "| upper"), "0 times"),
        (tiny.LLAMA3_TEMPLATE.replace("| trim", "| replace('spiders', 'cats')"), "alters"),
        (tiny.LLAMA3_TEMPLATE.replace("| trim", "| truncate(30)"), "alters"),
        (tiny.LLAMA3_TEMPLATE.replace("message['content']", "''"), "0 times"),
        (tiny.LLAMA3_TEMPLATE.replace("| trim", "* 2"), "2 times"),
        ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "share no token"),
    ],
)
def test_templates_that_do_not_keep_the_text_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        build_prompts(with_template(template), PREFIX, statements=GIVEN)


def test_a_template_without_system_messages_is_refused_when_one_is_asked_for():
    model = with_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tiny.LLAMA3_TEMPLATE
    )
    with pytest.raises(ValueError, match="system, user.*no system"):
        build_prompts(model, PREFIX, statements=GIVEN, system=True)
    assert build_prompts(model, PREFIX, statements=GIVEN).candidates == tiny.CLOSING


def test_a_template_that_drops_system_messages_is_refused():
    model = with_template(
        tiny.LLAMA3_TEMPLATE.replace("in messages", "in messages if message['role'] != 'system'")
    )
    with pytest.raises(ValueError, match="0 times"):
        build_prompts(model, PREFIX, statements=GIVEN, system=True)


def test_a_template_that_puts_the_system_message_last_is_followed():
    model = with_template(tiny.LLAMA3_TEMPLATE.replace("in messages", "in messages | reverse"))
    prompts = build_prompts(model, PREFIX, statements=GIVEN, system=True)
    assert prefix_text(model, prompts, 0) == PREFIX
    assert not prompts.prefix_mask[1].any()


def test_prompts_that_end_differently_are_no_prompt_set(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN)
    with pytest.raises(ValueError, match="candidate tokens"):
        replace(prompts, candidates=("one more", *prompts.candidates, "and more") * 3)
    with pytest.raises(ValueError, match="prefix_mask"):
        replace(prompts, prefix_mask=prompts.prefix_mask[:, 1:])
