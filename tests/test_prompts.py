from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import families
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lenskit.capture import capture
from lenskit.concepts import Concept, statement_prompt
from lenskit.enrichment import enrich
from lenskit.labels import soft_labels
from lenskit.models import load_model
from lenskit.models.templates import prepare_tokenizer
from lenskit.prompts import build_prompts, prompts_from_ids
from lenskit.selector import select_tokens
from lenskit.steering import steer
from lenskit.vectors import SoftCovariance, fit_vectors

PREFIX = "Personify someone who is terrified of spiders."
GIVEN = [f"Rain number {i} is better than sun." for i in range(8)]


def with_template(template: str, **options):
    """All that ``build_prompts`` needs of a model."""
    return SimpleNamespace(tokenizer=tiny.tiny_tokenizer(template=template, **options))


def prefix_text(model, prompts, row: int) -> str:
    return model.tokenizer.decode(prompts.tokens.input_ids[row][prompts.prefix_mask[row]])


def ids_of(prompts) -> list[list[int]]:
    mask = prompts.tokens.attention_mask.bool()
    return [ids[real].tolist() for ids, real in zip(prompts.tokens.input_ids, mask, strict=True)]


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
        ({"statements": {"Rain.": 1, "Sun.": 2}}, "list of strings, got a dict"),
        ({"statements": ["Rain.", 7]}, "strings that are not empty, got 7"),
        ({"statements": ["Rain.", " "]}, "strings that are not empty, got ' '"),
        ({"number": 4.0}, "got 4.0"),
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


@pytest.mark.parametrize("concept", [{"prefix": PREFIX}, ["Be kind."], None])
def test_a_concept_is_a_concept_or_its_prefix(model, concept):
    with pytest.raises(TypeError, match="concept must be a Concept or the text of its prefix"):
        build_prompts(model, concept, statements=GIVEN)


def test_statements_may_come_from_a_generator(model):
    prompts = build_prompts(model, PREFIX, statements=(text for text in GIVEN), seed=None)
    assert set(prompts.statements) == set(GIVEN)


def test_a_prefix_that_the_tokenizer_drops_is_refused_with_the_reason():
    tokenizer = prepare_tokenizer(families.real_tokenizer("word piece, lowercase"))
    model = SimpleNamespace(tokenizer=tokenizer)
    assert len(build_prompts(model, "Sé alegre \u0301\u0302.", statements=GIVEN)) == 8
    with pytest.raises(ValueError, match="tokenizer has no token for the prefix '\u0301'"):
        build_prompts(model, "\u0301", statements=GIVEN)


def test_characters_without_a_token_are_named():
    letters = sorted({*"User:?. \n_", *"".join(GIVEN), *statement_prompt("Assistant")})
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="_")
    model = SimpleNamespace(tokenizer=prepare_tokenizer(tokenizer))
    assert len(build_prompts(model, "some area", statements=GIVEN)) == 8
    with pytest.raises(ValueError, match="leaves 'éñ' out of 'User: some éñe.*no token for it"):
        build_prompts(model, "some éñe", statements=GIVEN)


DECOMPOSED = {
    "decomposed": "Cre\u0301e une humeur nai\u0308ve, n\u0303\u0323.",
    "jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 \u1112\u1161",
    "emoji": "Be 👩‍👩‍👧‍👦 and 🏳️‍🌈 👍🏽.",
    "right to left": "היה שמח, كن سعيدًا \u200f!",
    "compatibility": "ﬁne ① ㎞ ½ Ａ.",
    "case": "İSTANBUL Straße ΟΔΟΣ.",
}


@pytest.mark.parametrize("text", DECOMPOSED)
@pytest.mark.parametrize("kind", families.TOKENIZERS)
def test_text_that_is_written_in_many_ways_is_located(kind, text):
    """Between two plain words, so that the tokens before and behind it are known."""
    model = SimpleNamespace(tokenizer=prepare_tokenizer(families.real_tokenizer(kind)))
    prefix = f"mood {DECOMPOSED[text]} mood"
    prompts = build_prompts(model, prefix, layout="paired", statements=GIVEN[:1])
    row, other = ids_of(prompts)
    marked = prompts.prefix_mask[0][-len(row) :].nonzero().flatten().tolist()
    assert marked == list(range(marked[0], marked[-1] + 1))
    assert not prompts.prefix_mask[1].any()
    # What is left when the marked tokens are taken out begins and ends as without the prefix.
    rest = [token for i, token in enumerate(row) if i not in marked]
    decode = model.tokenizer.decode
    assert "".join(decode(rest).split()) == "".join(decode(other).split())
    own = decode([row[i] for i in marked]).strip()
    assert own.startswith("mood") and own.endswith("mood")


def test_prompts_from_ids_are_those_from_text():
    model = tiny.shared_model()
    text = build_prompts(model, PREFIX, layout="paired", statements=GIVEN)
    ids = ids_of(text)
    prefixes = []
    for row, mask, own in zip(ids, text.prefix_mask, text.has_prefix.tolist(), strict=True):
        places = mask[len(mask) - len(row) :].nonzero().flatten().tolist()
        prefixes.append((places[0], places[-1] + 1) if own else None)
    own = prompts_from_ids(
        model,
        PREFIX,
        ids,
        prefixes=prefixes,
        candidates=len(text.candidates),
        pair=text.pair.tolist(),
    )
    real = own.tokens.attention_mask.bool()
    assert torch.equal(own.tokens.attention_mask, text.tokens.attention_mask)
    assert torch.equal(own.tokens.input_ids[real], text.tokens.input_ids[real])
    assert torch.equal(own.prefix_mask, text.prefix_mask)
    assert torch.equal(own.has_prefix, text.has_prefix) and torch.equal(own.pair, text.pair)
    assert own.concept == text.concept and own.statements[1] == "prompt 1"
    seen, expected = (capture(model, prompts, progress=False) for prompts in (own, text))
    assert torch.equal(seen.attention_to_prefix, expected.attention_to_prefix)
    assert torch.equal(seen.resid_post, expected.resid_post)


def test_candidates_within_the_prompts_are_the_same_as_at_their_end():
    model = tiny.shared_model()
    ids = [[9, 20, 21, 22, 7, 8, 30], [9, 23, 7, 8, 31, 32], [9, 24, 25, 7, 8]]
    prefixes = [(1, 3), None, (1, 2)]
    within = prompts_from_ids(
        model, "digits", ids, prefixes=prefixes, candidates=[(4, 6), (2, 4), (3, 5)]
    )
    cut = [row[: row.index(8) + 1] for row in ids]
    at_end = prompts_from_ids(model, "digits", cut, prefixes=prefixes, candidates=2)
    assert within.candidates == at_end.candidates == ("7", "8")
    assert torch.equal(within.tokens.input_ids, at_end.tokens.input_ids)
    assert within.prefix_mask.sum(dim=1).tolist() == [2, 0, 1]
    assert within.tokens.input_ids[0][within.prefix_mask[0]].tolist() == [20, 21]
    assert within.pair.tolist() == [-1, -1, -1]


def test_prompts_from_ids_need_no_tokenizer_down_to_the_vectors():
    model = load_model(tiny.shared_folder(), device="cpu", check="hooks")
    model._tokenizer = None
    draw = torch.randint(10, 400, (12, 14), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [[*row, 7, 8] for row in draw]
    prefixes = [(2, 6) if i % 2 == 0 else None for i in range(12)]
    pair = [i ^ 1 for i in range(12)]
    prompts = prompts_from_ids(model, "drawn", ids, prefixes=prefixes, candidates=2, pair=pair)
    seen = capture(model, prompts, progress=False)
    tokens = select_tokens(seen)
    vectors = fit_vectors(seen, tokens, soft_labels(seen, tokens), learner=SoftCovariance())
    assert enrich(model, prompts, tokens, progress=False).top(1)
    with steer(model, vectors, coefficient=0.5, relative=True):
        steered = capture(model, prompts, progress=False)
    assert not torch.equal(steered.resid_post, seen.resid_post)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "prefixes must be one for each prompt, got 2 for 0"),
        ({"ids": [[1, 2, 7, 8], [3, 9000, 7, 8]]}, "ids of prompt 1 must be from 0 to 419"),
        ({"ids": [[1, 2, 7, 8], [3, -1, 7, 8]]}, "ids of prompt 1 must be from 0 to 419"),
        ({"ids": [[1.5, 2, 7, 8], [3, 4, 7, 8]]}, "ids of prompt 0 must be whole numbers"),
        ({"ids": [[1, 2, 7, 8], []]}, "ids of prompt 1 must be whole numbers"),
        ({"ids": [[1, 2, 7, 8], [3, 4, 6, 8]]}, "do not all end in the 2 candidate tokens"),
        ({"prefixes": [(0, 1)]}, "prefixes must be one for each prompt, got 1 for 2"),
        ({"prefixes": [(0, 0), None]}, "prefix of prompt 0 must hold a token"),
        ({"prefixes": [(0, 3), None]}, "end before its candidate tokens, which begin at 2"),
        ({"prefixes": [(-2, 1), None]}, "prefix of prompt 0 must hold a token"),
        ({"candidates": 0}, "candidates of prompt 0 must lie within its 4 tokens"),
        ({"candidates": 5}, "candidates of prompt 0 must lie within its 4 tokens"),
        ({"candidates": [(2, 4), (3, 4)]}, "candidates of prompt 1 are not 2"),
        ({"pair": [1, -1]}, "pair of prompt 0 is 1, which is not its partner"),
        ({"pair": [0, -1]}, "pair of prompt 0 is 0"),
        ({"ids": [[1, 2] * 300 + [7, 8], [3, 4, 7, 8]]}, "longest has 602 tokens.* 512 positions"),
    ],
)
def test_ids_that_are_no_prompts_are_refused_by_name(change, message):
    right = {"ids": [[1, 2, 7, 8], [3, 4, 7, 8]], "prefixes": [(0, 1), None], "candidates": 2}
    arguments = right | change
    with pytest.raises(ValueError, match=message):
        prompts_from_ids(tiny.shared_model(), "named", arguments.pop("ids"), **arguments)


def test_prompts_that_are_longer_than_the_models_positions_are_refused():
    model = tiny.shared_model()
    long = [f"{'Rain is better than sun. ' * 100} {i}" for i in range(2)]
    with pytest.raises(ValueError, match="2 of 2 prompts are too long.*has 512 positions"):
        build_prompts(model, PREFIX, statements=long)


def test_prompts_that_end_differently_are_no_prompt_set(model):
    prompts = build_prompts(model, PREFIX, statements=GIVEN)
    with pytest.raises(ValueError, match="candidate tokens"):
        replace(prompts, candidates=("one more", *prompts.candidates, "and more") * 3)
    with pytest.raises(ValueError, match="prefix_mask"):
        replace(prompts, prefix_mask=prompts.prefix_mask[:, 1:])
