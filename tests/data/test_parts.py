"""No fact on two sides, whichever file it comes from; small sets are shared and say so."""

from seuf_core.data.parts import FEWEST_FACTS_TO_SPLIT, sample, split_records
from seuf_core.data.records import Example, Probe

SHARES = (0.5, 0.2, 0.3)


def _example(fact: int, phrasing: int = 0) -> Example:
    return Example(f"{fact}-{phrasing}", "", "text", f"fact-{fact}", "")


def test_phrasings_and_probes_of_a_fact_are_on_one_side():
    examples = split_records([_example(f, p) for f in range(200) for p in range(3)], 0, SHARES)
    probes = split_records(
        [Probe(f"q{f}", "?", ("a", "b"), 0, f"fact-{f}", "", "forget") for f in range(200)], 0, SHARES
    )
    assert not examples.shared
    facts = [{e.fact for e in part} for part in (examples.train, examples.selection, examples.test)]
    assert sum(map(len, facts)) == len(set.union(*facts)) == 200
    assert [{p.fact for p in part} for part in (probes.train, probes.selection, probes.test)] == facts
    assert len(examples.train) == 3 * len(facts[0])
    assert examples.train == sorted(examples.train, key=lambda e: int(e.id.split("-")[0]))  # file order


def test_a_set_too_small_or_with_an_empty_part_is_shared():
    few = [_example(f) for f in range(FEWEST_FACTS_TO_SPLIT - 1)]
    parts = split_records(few, 0, SHARES)
    assert parts.shared
    assert parts.train == parts.selection == parts.test == few
    assert not split_records([*few, _example(99)], 0, SHARES).shared
    assert split_records([_example(f) for f in range(100)], 0, (1.0, 0.0, 0.0)).shared
    # Many phrasings of few facts are still few facts.
    assert split_records([_example(f % 3, f) for f in range(100)], 0, SHARES).shared


def test_a_sample_is_seeded_in_file_order_and_independent_of_that_order():
    records = [_example(f) for f in range(100)]
    chosen = sample(records, 10, 0)
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=records.index)
    assert {r.id for r in sample(records[::-1], 10, 0)} == {r.id for r in chosen}
    assert {r.id for r in sample(records, 10, 1)} != {r.id for r in chosen}
    assert sample(records, 100, 0) == sample(records, 1000, 0) == records
