"""Messages: one line, of bounded length, cut where it hurts least."""

import pickle

import pytest

from gdmd_lightning.errors import LONGEST, UserError, listed, shortened
from gdmd_lightning.locations import find_config

WORDS = "some words about what is wrong "


def test_short_message_is_unchanged():
    error = UserError("it is 'x'", where="data.source", remedy="use 'y'")
    assert str(error) == "data.source: it is 'x'; use 'y'"
    whole = UserError("a " * 100 + "z", where="w" * 130, remedy="b " * 80 + "y")
    assert str(whole) == f"{'w' * 130}: {'a ' * 100}z; {'b ' * 80}y"


@pytest.mark.parametrize("long", ["what", "where", "remedy", "all"])
@pytest.mark.parametrize("value", ["x" * 9_000, "x y " * 3_000, "'" + "a b" * 3_000 + "'", "\n\t" * 5_000 + "x" * 600])
def test_message_is_one_line_of_bounded_length(long: str, value: str) -> None:
    parts = {"what": "wrong", "where": "here", "remedy": "use another"}
    parts = {name: f"before {value} after" if long in (name, "all") else part for name, part in parts.items()}
    message = str(UserError(parts["what"], where=parts["where"], remedy=parts["remedy"]))
    assert len(message) <= LONGEST
    assert len(message.splitlines()) == 1
    for name, part in parts.items():
        assert (part if name != long and long != "all" else "before ") in message


def test_long_value_keeps_the_words_around_it():
    message = str(UserError(f"the key {'k' * 5_000!r} is unknown", where=f"/{'d' * 5_000}/p.csv:3", remedy="remove it"))
    assert message.startswith("/ddd")
    assert "dd/p.csv:3: the key 'kkk" in message
    assert message.endswith("kkk' is unknown; remove it")
    message = str(UserError(f"the prompt '{'a cat ' * 900}' is long", where="p", remedy="it's the encoder's limit"))
    assert message.endswith("cat ' is long; it's the encoder's limit")


def test_long_message_is_cut_between_words():
    message = str(UserError(WORDS * 40, where="here", remedy="use another"))
    assert message.startswith(f"here: {WORDS}")
    assert message.endswith(" ...; use another")
    assert message.removesuffix(" ...; use another").split()[-1] in WORDS.split()
    assert shortened("one two three", 13) == "one two three"
    assert shortened("one two three", 12) == "one two ..."
    assert shortened("x" * 20, 10) == "xxxxxx ..."


def test_control_characters_do_not_reach_the_terminal():
    assert str(UserError("bad \x1b[31mname\x00", where="a\rb")) == "a b: bad [31mname"


def test_error_survives_the_way_from_a_process_that_reads():
    error = UserError("it is 'x'", where="data.source", remedy="use 'y'")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.what, copy.where, copy.remedy) == (str(error), error.what, error.where, error.remedy)


@pytest.mark.parametrize("name", ["x" * 5_000, "\0", "a/" * 3_000])
def test_impossible_name_of_a_configuration_is_an_error(name):
    with pytest.raises(UserError, match=r"no configuration '.*; give a path, or one of: ") as caught:
        find_config(name)
    assert len(str(caught.value)) <= LONGEST


def test_listed_names_are_cut():
    assert listed([]) == "none"
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed((f"c{i}" for i in range(300)), most=2) == "'c0', 'c1' and 298 more"
    assert len(listed(["x" * 10_000] * 10_000)) < 400
