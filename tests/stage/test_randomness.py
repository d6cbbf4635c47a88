"""Seeds and generators made many at once are NumPy's own."""

import gc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.stage.collector import paused
from pagellm.stage.randomness import Streams, generators, seeds

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


@given(st.integers(0, 99), st.integers(1, 6))
@settings(deadline=None)
def test_streams_draw_what_their_generators_draw_one_by_one(start, draws):
    """In any order of permutations and integers, though each spends its own number of words."""
    rng = np.random.default_rng(start)
    seed = rng.integers(2**63, size=20).astype(np.uint64)
    streams, plain = Streams(seed), list(generators(seed))
    for at in range(draws):
        table, count = np.tile(np.arange(9) * 5, (len(seed), 1)), rng.integers(10, size=len(seed))
        # Of n = 3 * 2^30 one word in four is thrown away; n = 1 takes none.
        most = rng.choice([1, 2, 7, 3 << 30], size=len(seed))
        mixed, drawn = streams.permutation(table, count), streams.integers(most)
        for row, (one, n) in enumerate(zip(plain, count, strict=True)):
            assert mixed[row, :n].tolist() == one.permutation(table[row, :n]).tolist()
            assert mixed[row, n:].tolist() == table[row, n:].tolist()
            assert drawn[row] == one.integers(most[row])
        if at == 2:  # some of them go on by themselves
            some = np.flatnonzero(rng.random(len(seed)) < 0.5)
            streams, plain, seed = streams.of(some), [plain[row] for row in some], seed[some]


def test_the_collector_pauses_and_goes_on():
    assert gc.isenabled()
    with paused():
        assert not gc.isenabled()
        with paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
