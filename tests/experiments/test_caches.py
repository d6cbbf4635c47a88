"""The cache study: its counts equal the look-ups that were made."""

import numpy as np

from experiments.cost import caches


def test_hits_are_the_requests_of_users_met_before(served, capsys):
    got = caches.run(
        caches.Config(
            run="base",
            data=str(served / "data"),
            runs=str(served / "runs"),
            device="cpu",
            requests=60,
            batch=4,
            k=3,
            rounds=2,
        )
    )
    users = caches.requests(80, 60, 1.0, 0)
    hits, misses = got["hits"]["user"]
    assert misses == len(set(users.tolist())) and hits == 60 - misses
    # A prompt that occurs twice in a batch is looked up once by the policy and once by the reward.
    batches = [len(set(users[at : at + 4].tolist())) for at in range(0, 60, 4)]
    assert sum(got["hits"]["prompt"]) == 2 * sum(batches)
    assert (
        got["same"] == 60
        and got["with"] > 0
        and "60 of 60 pages are the same" in capsys.readouterr().out
    )


def test_skewed_requests_come_back_more_often():
    flat, skewed = (len(np.unique(caches.requests(500, 400, skew, 0))) for skew in (0.0, 1.2))
    assert skewed < flat < 400
