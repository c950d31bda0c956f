"""The list of errors keeps up with the code: a stale one would be passed over."""

from collections import Counter
from pathlib import Path

from mutations import MUTATIONS

TESTS = Path(__file__).parents[1]
SOURCES = TESTS.parent / "src/gdmd_lightning"


def test_every_error_has_one_place_a_name_of_its_own_and_tests():
    places = {m.name: (SOURCES / m.file).read_text().count(m.old) for m in MUTATIONS}
    assert {name: count for name, count in places.items() if count != 1} == {}
    assert [name for name, count in Counter(m.name for m in MUTATIONS).items() if count > 1] == []
    assert {test for m in MUTATIONS for test in m.tests if not (TESTS / test).exists()} == set()
