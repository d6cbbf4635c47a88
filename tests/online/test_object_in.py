"""The answer that is searched for within what a model said."""

import time

import pytest

from pagellm.online.chat import object_in


def test_an_answer_behind_a_number_of_thousands_of_digits_is_found():
    text = '{"count": ' + "9" * 5000 + '} so I say {"keywords": ["milk"]}'
    assert object_in(text, "keywords") == {"keywords": ["milk"]}


@pytest.mark.parametrize("begun", ["{", '{"keywords": [', '{"keywords": ', '{"a":'])
def test_a_megabyte_of_objects_without_an_end_is_given_up_in_a_moment(begun):
    text, began = begun * (1_000_000 // len(begun)), time.process_time()
    with pytest.raises(ValueError, match="no object in"):
        object_in(text, "keywords")
    assert time.process_time() - began < 10  # minutes, where each begin is read to the end
