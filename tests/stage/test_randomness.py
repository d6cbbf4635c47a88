"""Seeds and generators made many at once are NumPy's own."""

import gc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagellm.stage.collector import paused
from pagellm.stage.randomness import generators, seeds

word = st.integers(0, 2**32 - 1)


@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(word, min_size=n, max_size=n))))
def test_seeds_are_those_of_seed_sequence(rows):
    columns = list(zip(*rows, strict=True)) or [()]
    found = seeds([np.array(column, dtype=np.uint32) for column in columns], 3)
    want = [np.random.SeedSequence(row).generate_state(3, np.uint64) for row in rows]
    assert found.tolist() == [row.tolist() for row in want]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_generators_draw_what_pcg64_of_the_seed_draws(wanted):
    made = list(generators(np.array(wanted, dtype=np.uint64)))
    assert len(made) == len(wanted)
    for seed, rng in zip(wanted, made, strict=True):
        plain = np.random.Generator(np.random.PCG64(seed))
        assert rng.integers(2**63, size=4).tolist() == plain.integers(2**63, size=4).tolist()


def test_the_collector_pauses_and_goes_on():
    assert gc.isenabled()
    with paused():
        assert not gc.isenabled()
        with paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
