from __future__ import annotations

import json
import pickle
import re

import pytest

import lenskit as lk
from lenskit.tasks.records import bare_paraphrase, sentences

OWN = {
    "id": "Ann_Lee",
    "entity": "Ann",
    "attribute": "cares for the sick in Bath",
    "context": "Ann cares for the sick in Bath. She loves her work.",
    "prompt": "Ann has the occupation of",
    "target_mediated": "nurse",
    "target_unmediated": None,
    "source": {"bio": "…"},
}
FACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was created in",
        "relation_id": "P495",
        "target_new": {"str": "Norway", "id": "Q20"},
        "target_true": {"str": "Japan", "id": "Q17"},
        "subject": "Tea Time",
    },
    "paraphrase_prompts": [
        "He died in 1990. Tea Time, that originated in",
        "Much is said of it.\nTea Time was made in",
        "He died in 1990. Tea Time, that originated in",
    ],
    "neighborhood_prompts": ["Sake comes from"],
    "generation_prompts": ["Tea Time is"],
}
BIOGRAPHY = {
    "raw": "Dr. Ann B. Lee is a nurse at St. Mary's in Bath. Good. She has cared for the sick for "
    "years, and Lee's",
    "name": ["Ann", "B.", "Lee"],
    "title": "health_nurse",
    "gender": "F",
}


@pytest.fixture
def written(tmp_path):
    def write(*records, form="lines"):
        file = tmp_path / "records.json"
        if form == "list":
            file.write_text(json.dumps(records, indent=1))
        else:
            join = {"lines": "\n", "one after the other": ""}[form]
            file.write_text(join.join(json.dumps(record) for record in records))
        return file

    return write


def text_of(prompt) -> str:
    (message,) = prompt.messages
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize("form", ["list", "lines", "one after the other"])
def test_records_are_read_in_every_published_form(written, form):
    second = OWN | {"entity": "Bea", "context": "Bea cares for the sick in Bath.", "id": "2"}
    task = lk.tasks.read_task(written(OWN, second, form=form), "json")
    assert [prompt.metadata["entity"] for prompt in task.prompts] == ["Ann", "Bea"]
    one = lk.tasks.read_task(written(OWN, second, form=form), "json", slice(1, 2))
    assert one.prompts == task.prompts[1:]


def test_the_json_prompt_is_the_published_one(written):
    task = lk.tasks.read_task(written(OWN), "json")
    (prompt,) = task.prompts
    # In the published script the backslashes stay in the text.
    asked = (
        "Answer the occupation of Ann and generate the answer as json format. Here is an example: "
        r"\{'name': , 'occupation': ,\}. Now generate the answer:"
    )
    assert text_of(prompt) == f"{OWN['context']}\n{asked}\n"
    assert prompt.emphasised == asked and task.max_new_tokens == 128
    assert prompt.target == '{"name": "Ann", "occupation": "nurse"}'
    assert (
        task.score([prompt.target])
        == 1
        == lk.tasks.published_prediction(prompt, prompt.target).score
    )


def test_the_pronoun_prompt_is_the_published_one_and_its_example_answer_is_right(written):
    task = lk.tasks.read_task(written(OWN), "pronouns")
    (prompt,) = task.prompts
    asked = (
        "For the aforementioned text, substitute 'she' and 'he' with 'they' and generate the "
        "occupation of Ann after changing pronouns:"
    )
    assert text_of(prompt) == f"{OWN['context']}\n{asked}\n" and prompt.emphasised == asked
    # The published few-shot answers hold «tthey» and «tthem», and no instruction goes with them.
    assert prompt.target == "Ann cares for the sick in Bath. They love their work."
    assert task.score([prompt.target]) == 1 and task.score([prompt.otherwise]) == 0
    other = OWN | {"entity": "Bea", "context": "Bea cooks. He likes her."}
    pool = lk.tasks.read_task(written(OWN, other), "pronouns").prompts
    shown = lk.tasks.few_shot(prompt, pool, 1, separator="\n###\n")
    example, rest = text_of(shown).split("\n###\n")
    assert rest == text_of(prompt) and example.count("substitute 'she' and 'he'") == 1
    assert example.endswith("Bea cooks. They like them.")


def test_the_occupation_prompt_is_the_published_one_with_the_first_sentence_behind_the_name(
    written,
):
    poet = OWN | {"target_mediated": "poet", "context": "Ann writes of the sea..", "id": "2"}
    poet |= {"attribute": "writes of the sea"}
    task = lk.tasks.read_task(written(OWN, poet), "occupations")
    assert [text_of(prompt) for prompt in task.prompts] == [
        f"{OWN['context']}\n\nAnn has the occupation of",
        "Ann writes of the sea.\n\nAnn has the occupation of",
    ]
    assert [p.emphasised for p in task.prompts] == [OWN["attribute"], "writes of the sea"]
    assert task.labels == ("nurse", "poet") and [p.target for p in task.prompts] == [
        "nurse",
        "poet",
    ]
    assert task.score(["nurse", "nurse"]) == 0.5


def test_a_span_that_occurs_again_is_the_one_behind_the_name_and_an_empty_one_is_the_sentence(
    written,
):
    twice = OWN | {"context": "About sea, Ann: sea. She likes the sea.", "attribute": "sea"}
    empty = OWN | {"context": "A song of Ann. She sings it.", "attribute": ""}
    again, whole = lk.tasks.read_task(written(twice, empty), "occupations").prompts
    assert again.characters == (16, 19) and again.nth == 1
    assert whole.emphasised == "A song of Ann"


@pytest.mark.parametrize("own_format", [True, False])
def test_the_counterfact_prompt_is_the_published_one(written, own_format):
    record = FACT
    if not own_format:
        record = {
            "id": "7",
            "entity": "Tea Time",
            "attribute": "was created in Norway",
            "context": "Tea Time was created in Norway",
            "prompt": "Tea Time, that originated in",
            "target_mediated": "Norway",
            "target_unmediated": "Japan",
            "source": FACT,
        }
    file = written(record)
    task = lk.tasks.read_task(file, "counterfact")
    (prompt,) = task.prompts
    facts = "Previously Tea Time was created in Japan. Currently Tea Time was created in Norway. "
    assert text_of(prompt) == facts + "Tea Time, that originated in"
    assert prompt.emphasised == "was created in Norway"
    assert (prompt.target, prompt.otherwise) == ("Norway", "Japan")
    assert task.score(["Norway"]) == 1 and task.reasons(["Japan"]) == {"span ignored": 1}
    # Paraphrases are evaluated as they are, once each, and count as one case.
    wordings = lk.tasks.read_task(file, "paraphrases")
    assert [text_of(p) for p in wordings.prompts] == [
        facts + text for text in FACT["paraphrase_prompts"][:2]
    ]
    assert wordings.scores(["Norway", "Japan"]).tolist() == [0.5]


def test_the_emphasised_attribute_is_that_of_the_new_fact_though_the_old_one_holds_its_words(
    written,
):
    rewrite = FACT["requested_rewrite"] | {
        "target_new": {"str": "York"},
        "target_true": {"str": "York Mills"},
    }
    (prompt,) = lk.tasks.read_task(
        written(FACT | {"requested_rewrite": rewrite}), "counterfact"
    ).prompts
    text = text_of(prompt)
    start, end = prompt.characters
    assert text[start:end] == "was created in York" and start > text.index("Currently")
    assert prompt.nth == 1


def test_where_the_new_attribute_ends_with_the_subject_the_new_target_is_emphasised(written):
    rewrite = FACT["requested_rewrite"] | {"subject": "Time", "target_new": {"str": "Tea Time"}}
    record = FACT | {"requested_rewrite": rewrite}
    (prompt,) = lk.tasks.read_task(written(record), "counterfact").prompts
    assert prompt.emphasised == "Tea Time" and prompt.characters[0] > text_of(prompt).index("Curr")


def test_paraphrases_lose_what_stands_before_the_subjects_sentence():
    found = {
        "The sex ratio was 1063. Tea Time, that came from": "Tea Time, that came from",
        "It ended.\nMuch later Tea Time was made in": "Much later Tea Time was made in",
        "Category:Films\nCategory:Tea Time (film). Tea Time was made in": "Tea Time was made in",
        "Who knows? Tea Time was made in": "Who knows? Tea Time was made in",
        "No one was there.  v": "No one was there.  v",
        "Dr. Tea Time lives in": "Dr. Tea Time lives in",
    }
    assert {text: bare_paraphrase("Tea Time", text) for text in found} == found


def test_sentences_end_after_stops_but_not_after_abbreviations():
    text = 'Dr. Lee came. She left at 5 p.m. and slept! "Why?" asked J. Doe.  He knew.'
    assert sentences(text) == [
        "Dr. Lee came.",
        "She left at 5 p.m. and slept!",
        '"Why?" asked J. Doe.',
        "He knew.",
    ]


def test_biographies_are_brought_to_the_published_form(written):
    file = written(BIOGRAPHY | {"raw": BIOGRAPHY["raw"].replace(", and Lee's", ".")})
    (prompt,) = lk.tasks.read_task(file, "occupations").prompts
    # The full name is the first name, and sentences of one or two words are left out.
    context = "Ann is a nurse at St. Mary's in Bath. She has cared for the sick for years."
    assert text_of(prompt) == f"{context}\n\nAnn has the occupation of"
    assert prompt.emphasised == "is a nurse at St. Mary's in Bath"
    assert prompt.target == "health nurse" and prompt.metadata["id"] == "Ann_B._Lee"


def test_a_biography_that_names_its_person_twice_or_is_short_is_left_out(written):
    nameless = BIOGRAPHY | {"raw": "She is a nurse at the hospital in Bath, and likes it there."}
    short = BIOGRAPHY | {"raw": "Ann Lee is a nurse in Bath."}
    task = lk.tasks.read_task(written(BIOGRAPHY, nameless, short), "json")
    assert [prompt.metadata["context"][:12] for prompt in task.prompts] == ["About Ann: S"]
    with pytest.raises(ValueError, match="holds no usable record"):
        lk.tasks.read_task(written(short), "json")


def damaged(record: dict, **changes) -> dict:
    return {key: value for key, value in (record | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("record", "name", "what"),
    [
        (damaged(OWN, entity=...), "json", "entity must be a text, got None; it has id, attribute"),
        (damaged(OWN, context=3), "json", "context must be a text, got 3"),
        (damaged(OWN, target_mediated=None), "json", "target_mediated must be a text"),
        (damaged(OWN, prompt=" "), "json", "prompt must be a text"),
        (damaged(OWN, attribute="sings"), "occupations", "'sings' does not begin"),
        (OWN, "counterfact", "target_unmediated is missing"),
        (OWN | {"target_unmediated": "poet"}, "paraphrases", "paraphrase_prompts is missing"),
        ([OWN], "json", "is no record"),
        (damaged(FACT, paraphrase_prompts=[3]), "counterfact", "paraphrase_prompts must be a list"),
        (damaged(FACT, paraphrase_prompts=[]), "counterfact", "paraphrase_prompts is empty"),
        (damaged(FACT, requested_rewrite={}), "counterfact", "requested_rewrite.target_new.str"),
        (damaged(BIOGRAPHY, name="Ann"), "json", "name must be a list of texts"),
        (damaged(BIOGRAPHY, title=None), "json", "title must be a text"),
    ],
)
def test_a_damaged_record_is_refused_by_file_and_line(written, record, name, what):
    good = FACT if name in ("counterfact", "paraphrases") else OWN
    file = written(good, good, record)
    place = re.escape(f"{file}: line 3 (record 3): ")
    with pytest.raises(ValueError, match=place + ".*" + re.escape(what)):
        lk.tasks.read_task(file, name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'[\n{"id":\n', "line 2 (record 1): Expecting value at line 3"),
        (b"name,title\n", "line 1 (record 1): Expecting value"),
        (b"[{}\n {}]", "line 1 (record 1): "),
        (b"[", "the list does not end after record 0"),
        (b"", "holds no usable record"),
        (b"\n\n\xff", "line 3: not UTF-8"),
        (b"[" * 100_000, "line 1 (record 1): cannot be read"),
        (pickle.dumps([BIOGRAPHY]), "a pickle must be written as JSON first"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_line(tmp_path, text, what):
    file = tmp_path / "records.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{re.escape(what)}"):
        lk.tasks.read_task(file, "json")


def test_a_list_with_text_behind_it_or_without_commas_is_refused(written):
    file = written(OWN, form="list")
    whole = file.read_text()
    for text, what in (
        (whole + "x", "'x' stands after the end of the list"),
        (whole[:-1], "the list does not end after record 1"),
        (whole[:-1] + json.dumps(OWN) + "]", "neither a comma nor the end"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=what):
            lk.tasks.read_task(file, "json")


def test_what_is_asked_for_must_be_there(written, tmp_path):
    with pytest.raises(ValueError, match="no public task 'biasbios'; there are json, pronouns"):
        lk.tasks.read_task(written(OWN), "biasbios")
    with pytest.raises(ValueError, match="has 1 usable records, none of them"):
        lk.tasks.read_task(written(OWN), "json", slice(5000, 10000))
    with pytest.raises(FileNotFoundError):
        lk.tasks.read_task(tmp_path / "nothing.json", "json")
    with pytest.raises(ValueError, match="is not a regular file"):
        lk.tasks.read_task(tmp_path, "json")
