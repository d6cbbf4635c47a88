"""The arithmetic that costs time, usable alone: tensors in, tensors out; imports torch and itself only.

    logprob.py     log-probability and entropy of chosen tokens: from logits, or straight from hidden states
                   in tiles that never hold (N, V); plain and restricted to a legal set
    advantage.py   generalised advantage estimate and returns, no Python loop over T
    masked.py      mean, variance, centring and whitening under a mask
    reference.py   the same formulas, slow and obvious, float64: tests and readers start here
    checks.py      the errors and the dtype rule that all of them share
    bench.py       python -m kernels.bench: plain against ours in one run, a table, one JSON line

Every kernel computes in float64 when an input is float64 and in float32 otherwise, and returns that dtype:
half precision goes in, never comes out, because a bf16 log-probability ruins PPO's ratio.
"""
