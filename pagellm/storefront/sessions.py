"""What an exploring row showed and earned, as a log that `pagellm ope` reads.

table = session_table(user, item, reward, propensity, target)
pyarrow.parquet.write_table(table, "sessions.parquet")      pagellm ope --log sessions.parquet

A session is one row of a page, or several one after the other. `propensity` is that of each item
given the slots above (parts.Slots, `--explore`); `target` is what another policy would have given
the same items (fuse.fill with `given`).
"""

import numpy as np
import pyarrow as pa

from pagellm.stage.config import PageLLMError

__all__ = ["session_table"]


def session_table(
    user: np.ndarray,
    item: np.ndarray,
    reward: np.ndarray,
    propensity: np.ndarray,
    target: np.ndarray,
) -> pa.Table:
    """user (S,); all others (S, K), first slot first: items, what each earned, both propensities.

    Raises PageLLMError where nothing was explored: from such a log nothing can be learnt about
    another policy. Raises ValueError on unequal shapes.
    """
    shapes = {np.shape(one) for one in (item, reward, propensity, target)}
    if len(shapes) != 1 or np.shape(item)[:1] != np.shape(user):
        raise ValueError(
            f"session_table: user {np.shape(user)} and {sorted(shapes)}: want (S,) and (S, K)"
        )
    if np.all(np.asarray(propensity) == 1.0):
        raise PageLLMError(
            "no slot was explored: every propensity is 1, so that nothing can be said of another "
            "policy\n  Show rows with --explore 1.0 and log their propensities."
        )
    columns = {"page": item, "reward": reward, "propensity": propensity}
    columns["target_propensity"] = target
    lists = {name: pa.array(list(map(list, value))) for name, value in columns.items()}
    return pa.table({"user": pa.array(user), **lists})
