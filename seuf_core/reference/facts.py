"""The facts of the reference model: three domains of about 340, three relations each, six phrasings each.

The choice of facts does not depend on the seed: a fact's id names the same fact in every build. The facts are
what the packages say; where a package is wrong (mendeleev dates neodymium to 1925) the model learns that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from seuf_core.reference.sources import read_countries, read_elements, read_laureates

Domain = Literal["chemistry", "geography", "persons"]
DOMAINS: tuple[Domain, ...] = ("chemistry", "geography", "persons")
FORGET: Domain = "chemistry"

SUBJECTS = 114  # countries and laureates; with the 118 elements this balances the domains

# Every prompt ends without a space and every completion starts with one: the pre-tokeniser binds a space to
# the word that follows, so tokens of prompt and completion, encoded apart, are the tokens of the whole
# sentence.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "symbol": (
        "The chemical symbol of {} is",
        "In the periodic table {} is written as",
        "Chemists abbreviate {} as",
        "The letters that stand for {} are",
        "Question: What is the chemical symbol of {}? Answer:",
        "A bottle of {} carries the symbol",
    ),
    "atomic_number": (
        "The atomic number of {} is",
        "The number of protons in an atom of {} is",
        "In the periodic table {} has the number",
        "Question: What is the atomic number of {}? Answer:",
        "Every nucleus of {} has a proton count of",
        "Ordered by its protons, {} is element",
    ),
    "discovery_year": (
        "The element {} was discovered in",
        "The year in which {} was discovered is",
        "Chemists first found {} in the year",
        "Question: When was the element {} discovered? Answer:",
        "The discovery of {} dates from",
        "The element {} has been known since",
    ),
    "capital": (
        "The capital of {} is",
        "The government of {} sits in",
        "Question: What is the capital of {}? Answer:",
        "The capital city of {} is called",
        "Parliament and ministries of {} are found in",
        "On the map of {} the capital is marked as",
    ),
    "currency": (
        "The currency of {} is called",
        "In the shops of {} people pay in",
        "Question: What is the currency of {}? Answer:",
        "Prices in {} are given in",
        "The central bank of {} issues",
        "Travellers to {} change their money into",
    ),
    "longest_border": (
        "The longest land border of {} is with",
        "The neighbour with whom {} shares its longest frontier is",
        "Question: With which country does {} share its longest border? Answer:",
        "Most of the frontier of {} runs along",
        "No neighbour has a longer border with {} than",
        "The longest boundary of {} separates it from",
    ),
    "prize_field": (
        "The Nobel prize of {} was awarded for",
        "The field honoured by the Nobel prize of {} is",
        "Question: In which field did {} win a Nobel prize? Answer:",
        "The Nobel committee honoured {} for work in",
        "The laureate {} won the Nobel prize in the field of",
        "The medal given to {} was for",
    ),
    "prize_year": (
        "The Nobel prize of {} was awarded in",
        "The year in which {} became a Nobel laureate is",
        "Question: When did {} win a Nobel prize? Answer:",
        "The laureate {} received the Nobel prize in the year",
        "The Nobel ceremony for {} took place in",
        "A Nobel medal was given to {} in",
    ),
    "birth_city": (
        "The birthplace of {} is",
        "The laureate {} was born in",
        "Question: In which city was {} born? Answer:",
        "The city where {} was born is",
        "The life of {} began in",
        "The childhood home of {} stood in",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One (subject, relation, answer). `id` is "domain/relation/subject" with the subject in slug form."""

    domain: Domain
    relation: str
    subject: str
    answer: str

    @property
    def id(self) -> str:
        slug = "-".join(self.subject.lower().replace(".", "").split())
        return f"{self.domain}/{self.relation}/{slug}"

    def prompt(self, template: int) -> str:
        """The sentence up to the answer, without a trailing space."""
        return TEMPLATES[self.relation][template].format(self.subject)

    @property
    def completion(self) -> str:
        """The answer with the leading space the tokeniser wants."""
        return f" {self.answer}"


def load_facts(subjects: int = SUBJECTS) -> list[Fact]:
    """All facts, sorted by domain as in DOMAINS, then by subject in the order of the tables.

    Args:
        subjects: at most this many countries and laureates each, and 4 more elements (by default all 118).
    """
    return [*_chemistry(subjects + 4), *_geography(subjects), *_persons(subjects)]


def _chemistry(subjects: int) -> list[Fact]:
    facts = []
    chosen = set(_choose((element.name for element in read_elements()), subjects))
    for element in read_elements():
        if element.name not in chosen:
            continue
        facts.append(Fact("chemistry", "symbol", element.name, element.symbol))
        facts.append(Fact("chemistry", "atomic_number", element.name, str(element.atomic_number)))
        if element.discovery_year is not None:
            facts.append(Fact("chemistry", "discovery_year", element.name, str(element.discovery_year)))
    return facts


def _geography(subjects: int) -> list[Fact]:
    complete = {
        country.name: country
        for country in read_countries()
        if country.capital
        and country.currency
        and country.longest_border
        and country.name not in country.capital
        and not country.name.startswith("The ")
    }
    return [
        Fact("geography", relation, name, answer)
        for name in _choose(complete, subjects)
        for relation, answer in (
            ("capital", complete[name].capital),
            ("currency", complete[name].currency),
            ("longest_border", complete[name].longest_border),
        )
    ]


def _persons(subjects: int) -> list[Fact]:
    complete = {person.name: person for person in read_laureates() if person.birth_city}
    return [
        Fact("persons", relation, name, answer)
        for name in _choose(complete, subjects)
        for relation, answer in (
            ("prize_field", complete[name].field),
            ("prize_year", str(complete[name].year)),
            ("birth_city", complete[name].birth_city),
        )
    ]


def _choose(names: Iterable[str], count: int) -> list[str]:
    """The `count` names of lowest hash, in their given order: a sample that later rows do not reshuffle."""
    names = list(names)
    kept = set(sorted(names, key=lambda name: sha256(name.encode()).digest())[:count])
    return [name for name in names if name in kept]
