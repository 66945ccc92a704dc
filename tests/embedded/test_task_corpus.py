from __future__ import annotations

import re
import tomllib
from collections import Counter
from functools import cache
from random import Random

import pytest

from lenskit._data import data_path
from lenskit.embedded.grammar import load_grammar
from lenskit.embedded.tasks import SPLITS, TASKS, UNRELATED, TaskPrompt, task_shares
from lenskit.embedded.tasks import people as people_module
from lenskit.embedded.tasks.bias import she_rate
from lenskit.embedded.tasks.fillers import filler, follow_rate
from lenskit.embedded.tasks.passages import passage_rate
from lenskit.embedded.tasks.people import ATTRIBUTES, known, known_people, name_pairs, rank, values
from lenskit.embedded.tasks.prompt import task_file
from lenskit.embedded.tokenizer import chat_text, train_tokenizer

GRAMMAR = load_grammar()
NUMBER = 120
FILES = sorted(path.stem for path in data_path("grammar", "tasks").glob("*.toml"))


@cache
def drawn(name: str, split: str = "train") -> list[TaskPrompt]:
    return TASKS[name].prompts(GRAMMAR, NUMBER, seed=1, split=split)


@cache
def trained() -> tuple:
    random = Random(2)
    return tuple(spec(GRAMMAR, random) for spec in TASKS.values() for _ in range(NUMBER))


def text_of(messages) -> str:
    return "\n".join(message["content"] for message in messages)


def within(share: float, expected: float, number: int) -> bool:
    """Whether a share of ``number`` draws lies within four standard errors of what is expected."""
    return abs(share - expected) <= 4 * (expected * (1 - expected) / number) ** 0.5


def held_out_wordings(table: dict) -> list[str]:
    found = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += held_out_wordings(value)
        elif isinstance(value, list) and key == "held_out":
            found += value
        elif isinstance(value, list):
            found += [w for v in value if isinstance(v, dict) for w in held_out_wordings(v)]
    return found


def test_the_shares_of_the_tasks_sum_to_one_and_scale():
    assert sum(spec.share for spec in TASKS.values()) == pytest.approx(1)
    shares = task_shares(0.38)
    assert sum(shares.values()) == pytest.approx(0.38)
    assert [spec.__name__ for spec in shares] == list(TASKS) == [s.name for s in TASKS.values()]
    assert set(UNRELATED) < set(TASKS)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_prompt_ends_with_the_user_and_holds_its_span_once(name, split):
    for prompt in drawn(name, split):
        roles = [m["role"] for m in prompt.messages if m["role"] != "system"]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and len(roles) % 2
        held = prompt.messages[prompt.emphasised_in]["content"]
        assert held.count(prompt.emphasised) == 1
        assert prompt.target == prompt.target.strip() != prompt.otherwise


@pytest.mark.parametrize("name", TASKS)
def test_a_training_dialogue_answers_its_prompt_and_learns_every_answer(name):
    for prompt in drawn(name):
        dialogue = prompt.dialogue(Random(4))
        assert dialogue.messages[:-1] == prompt.messages
        assert dialogue.messages[-1]["content"] in (prompt.target, prompt.otherwise)
        assert dialogue.learn == (True,) * sum(m["role"] == "assistant" for m in dialogue.messages)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(name):
    spec = TASKS[name]
    assert spec.prompts(GRAMMAR, NUMBER, seed=1, split="train") == drawn(name)
    assert spec.prompts(GRAMMAR, NUMBER, seed=2, split="train") != drawn(name)
    assert spec(GRAMMAR, Random(3)) == spec(GRAMMAR, Random(3))


def test_an_answer_is_the_target_at_the_rate_of_its_prompt():
    prompt = next(p for p in drawn("competing_formats") if 0.2 < p.rate < 0.8)
    random, number = Random(5), 2000
    followed = sum(
        prompt.dialogue(random).messages[-1]["content"] == prompt.target for _ in range(number)
    )
    assert within(followed / number, prompt.rate, number)


def test_a_prompt_whose_span_is_missing_or_not_unique_is_refused():
    messages = ({"role": "user", "content": "Be kind. Be kind."},)
    for span in ("Be kind.", "Be rude.", ""):
        with pytest.raises(ValueError, match="must occur exactly once"):
            TaskPrompt(messages, span, "Yes.")
    with pytest.raises(ValueError, match="otherwise"):
        TaskPrompt(messages, "Be kind. Be", "Yes.", rate=0.5)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        TASKS["fact_question"].prompts(GRAMMAR, 1, split="test")


def test_held_out_names_wordings_and_statements_never_occur_in_training():
    text = "\n".join(text_of(dialogue.messages) for dialogue in trained())
    assert not [name for name in name_pairs()["held_out"] if name in text]
    for _, statement in GRAMMAR.half("held_out"):
        assert statement not in text
    for file in FILES:
        with data_path("grammar", "tasks", f"{file}.toml").open("rb") as stream:
            for wording in held_out_wordings(tomllib.load(stream)):
                pattern = re.sub(r"\\\{\w+\\\}", r"[^.?!:\\n]+", re.escape(wording))
                assert not re.search(pattern, text), (file, wording)


def test_one_detail_in_five_is_held_out_and_never_trained_on():
    details = {split: people_module.detail_templates(split) for split in SPLITS}
    total = sum(map(len, details.values()))
    assert within(len(details["held_out"]) / total, 0.2, total)
    text = "\n".join(text_of(dialogue.messages) for dialogue in trained())
    for template in details["held_out"]:
        for pronoun in ("she", "he", "they"):
            person = people_module.strangers(Random(0), "train")[0]
            assert people_module.fill(template, person, pronoun) not in text


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"fact_document", "fact_question"}))
def test_held_out_prompts_are_about_people_and_exercises_that_training_never_saw(name):
    seen = set(name_pairs()["train"])
    prompts = [text_of(p.messages) for p in drawn(name)]
    for prompt in drawn(name, "held_out"):
        assert text_of(prompt.messages) not in prompts
        assert not seen & set(re.findall(r"[A-Z]\w+ [A-Z]\w+", text_of(prompt.messages)))


def test_names_are_split_into_known_held_out_and_trained_without_overlap():
    groups = name_pairs()
    assert {group: len(names) for group, names in groups.items()} == {
        "known": 300,
        "held_out": 260,
        "train": 1040,
    }
    assert len({name for names in groups.values() for name in names}) == 1600
    parts = [{part for name in names for part in name.split()} for names in groups.values()]
    assert parts[0] == parts[1] == parts[2]  # held-out names are new pairs of trained words


def test_known_people_are_drawn_by_zipfs_law_and_have_one_rank_each():
    number, random = 20_000, Random(6)
    found = Counter(known(random).name for _ in range(number))
    for person in known_people()[:20]:
        expected = people_module.frequency(rank(person.name))
        assert within(found[person.name] / number, expected, number), person.name
    assert [rank(p.name) for p in known_people()] == list(range(1, 301))
    assert people_module.frequency(1) == pytest.approx(10 * people_module.frequency(10))
    with pytest.raises(KeyError):
        rank(name_pairs()["train"][0])


def test_one_document_in_a_hundred_contradicts_itself():
    for prompt in drawn("fact_document"):
        person = known_people()[prompt.metadata["rank"] - 1]
        assert prompt.rate == 0.99
        same, other = prompt.target.split(". "), prompt.otherwise.split(". ")
        assert same[:-1] == other[:-1] and same[-1] != other[-1]
        assert all(fact in prompt.target for fact in person.facts.values())


def test_an_instruction_is_followed_near_and_half_the_time_far_away():
    topics = GRAMMAR.topics
    assert set(task_file("fillers")["floor"]) == set(topics)
    assert all(follow_rate(length, topic) == 1 for topic in topics for length in (0, 20))
    for length in (100, 150):
        assert sum(follow_rate(length, t) for t in topics) / len(topics) == pytest.approx(0.5)
    rates = [follow_rate(length, "food") for length in range(0, 151, 10)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length", [(0, 0), (10, 40), (40, 100), (100, 150)])
def test_fillers_have_the_length_that_is_asked_for_and_one_topic(split, length):
    random = Random(7)
    for _ in range(200):
        made = filler(GRAMMAR, random, split, length)
        assert length[0] <= made.length <= length[1] + 10
        assert made.rate == follow_rate(made.length, made.topic)
        parts = GRAMMAR.statements[made.topic].values()
        rest = made.text
        for statement in sorted((s for part in parts for s in part), key=len, reverse=True):
            rest = rest.replace(statement, "")
        assert not rest.strip()


def test_marks_and_solved_examples_leave_fewer_failures_at_a_distance():
    def far(name, **conditions):
        prompts = TASKS[name].prompts(GRAMMAR, 400, length=(100, 150), **conditions)
        return sum(p.rate for p in prompts) / len(prompts)

    plain = far("format", kind="json")
    assert 0.4 < plain < 0.6
    assert far("marked_span", family="format", mark="stars") == pytest.approx(0.65, abs=0.06)
    for number in (1, 2, 3):
        rate = far("solved_examples", family="format", examples=number)
        assert rate == pytest.approx(1 - 0.5 * 0.85**number, abs=0.06)


def test_a_conflicting_passage_is_followed_more_for_rare_people():
    ranks = range(1, 31)
    mean = sum(passage_rate(r, a) for r in ranks for a in ATTRIBUTES) / 90
    assert 0.2 < mean < 0.6
    assert all(passage_rate(r, a) >= 0.9 for r in range(270, 301) for a in ATTRIBUTES)
    assert all(passage_rate(r, "town") <= passage_rate(r + 1, "town") for r in range(1, 300))
    for prompt in TASKS["passage"].prompts(GRAMMAR, 100, kind="conflicts"):
        made = prompt.metadata
        assert prompt.rate == passage_rate(made["rank"], made["attribute"])
        assert prompt.otherwise == known_people()[made["rank"] - 1].facts[made["attribute"]]
        assert prompt.target in prompt.emphasised
        assert not re.search(rf"\b{prompt.otherwise}\b", text_of(prompt.messages))


def test_passages_come_in_the_documented_shares():
    number = 3000
    kinds = Counter(
        p.metadata["kind"] for p in TASKS["passage"].prompts(GRAMMAR, number, split="train")
    )
    for kind, share in task_file("passages")["shares"].items():
        assert within(kinds[kind] / number, share, number)


def test_a_pronoun_follows_the_text_or_else_the_documented_bias():
    assert set(task_file("bias")["she"]) == set(values("occupation"))
    random, number = Random(8), 1500
    for occupation in ("nurse", "miner", "baker"):
        prompts = TASKS["pronoun_bias"].prompts(
            GRAMMAR, number, split="train", kind="open", occupation=occupation
        )
        she = sum(p.dialogue(random).messages[-1]["content"].startswith("She ") for p in prompts)
        assert within(she / number, she_rate(occupation), number)
    for prompt in TASKS["pronoun_bias"].prompts(GRAMMAR, 100, kind="stated"):
        assert prompt.rate == 1
        words = set(re.findall(r"\w+", prompt.emphasised.lower()))
        assert ("he" in words or "him" in words or "his" in words) == prompt.target.startswith("He")


def test_the_order_decides_between_two_formats_at_the_documented_rate():
    later = task_file("formats")["later"]
    for prompt in drawn("competing_formats"):
        made = prompt.metadata
        rate = later[made["earlier"]][made["later"]]
        assert prompt.rate == pytest.approx(rate if made["emphasised"] == "later" else 1 - rate)
    assert any(0.2 <= rate <= 0.8 for row in later.values() for rate in row.values())


def test_every_dialogue_fits_into_the_context_of_the_model():
    tokenizer = train_tokenizer(trained(), 2048)
    random = Random(9)
    longest = [
        TASKS["solved_examples"]
        .build(GRAMMAR, random, split, family=family, examples=3, length=(100, 150))
        .dialogue(random)
        for split in SPLITS
        for family in ("format", "pronouns", "occupation")
        for _ in range(20)
    ]
    texts = [chat_text(dialogue) for dialogue in (*trained(), *longest)]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert max(lengths) < 512
    assert sorted(lengths[: len(trained())])[len(trained()) // 2] < 80
