from __future__ import annotations

import pytest

from lenskit.concepts import Concept, ConceptClass, concepts, statement_prompt, statements
from lenskit.embedded.grammar import load_grammar


def test_the_five_classes_hold_512_concepts_by_name():
    assert list(concepts) == ["fears", "moods", "places", "experts", "personas"]
    assert len(concepts) == 5
    assert sum(len(concepts[name]) for name in concepts) == 512
    assert concepts["fears"]["spiders"].prefix == "Personify someone who is terrified of spiders."
    assert concepts["moods"]["bored"].prefix == "Take on a bored mood."
    assert concepts["personas"]["innkeeper"].prefix == "Take on the role of an innkeeper."


@pytest.mark.parametrize("name", concepts)
def test_a_class_is_a_mapping_whose_concepts_know_their_class_and_questions(name):
    found, rules = concepts[name], load_grammar().classes[name]
    assert isinstance(found, ConceptClass)
    assert list(found) == list(rules.entries)
    for key, concept in found.items():
        assert (concept.name, concept.concept_class) == (key, name)
        assert concept.questions == found.questions
        assert concept.prefix == rules.prefix_for(key)
    assert found.questions == tuple(wordings[0] for wordings in rules.questions)
    assert name in repr(found) and str(len(found)) in repr(found)


def test_an_unknown_class_or_concept_is_named_with_what_there_is():
    with pytest.raises(KeyError, match="'dreams'.*fears, moods"):
        concepts["dreams"]
    with pytest.raises(KeyError, match=r"'taxes'.*103 concepts.*spiders.*Concept\(prefix="):
        concepts["fears"]["taxes"]
    assert "dreams" not in concepts and "taxes" not in concepts["fears"]
    assert concepts["fears"].get("taxes") is None


def test_concepts_compare_by_what_they_say_and_can_be_keys():
    assert concepts["fears"]["bees"] == concepts["fears"]["bees"]
    assert len({concepts["fears"]["bees"], concepts["fears"]["bees"]}) == 1
    own = Concept(prefix="Personify someone who likes tea.", questions=["Coffee?", "Milk?"])
    assert own.questions == ("Coffee?", "Milk?")
    assert (own.name, own.concept_class) == ("custom", None)
    assert hash(own) == hash(Concept("Personify someone who likes tea.", questions=own.questions))


@pytest.mark.parametrize("prefix", ["", "  \n"])
def test_a_concept_without_a_prefix_is_refused(prefix):
    with pytest.raises(ValueError, match="prefix of concept 'tea'"):
        Concept(prefix=prefix, name="tea")


def test_one_string_of_questions_is_refused():
    with pytest.raises(ValueError, match="questions of concept 'custom' are one string, 'Who'"):
        Concept(prefix="Be brief.", questions="Who")


def test_statements_come_in_two_halves_and_a_held_out_part_that_are_disjoint():
    first, second, held_out = (statements(half) for half in ("first", "second", "held_out"))
    assert statements() == first
    assert (len(first), len(second), len(held_out)) == (200, 200, 80)
    assert len({*first, *second, *held_out}) == 480
    with pytest.raises(ValueError, match="'third'"):
        statements("third")


def test_a_prefix_stands_two_spaces_before_the_statement_prompt():
    bare = statement_prompt("Rain is wet.")
    assert statement_prompt("Rain is wet.", "Be shy.") == f"Be shy.  {bare}"
