"""The arithmetic that takes most of the time: tensors in, tensors out; it needs only torch.

    logprob.py     log-probability and entropy of chosen tokens: from logits, or straight from
                   hidden states in tiles, without a tensor of all (N, V) logits; over all tokens or
                   a legal set
    advantage.py   generalised advantage estimation, without a Python loop over T
    masked.py      mean, variance, centring and whitening under a mask
    reference.py   the same formulas, slow and plain, in float64: start reading here
    checks.py      argument checks and the dtype rule that all kernels share
    bench.py       python -m kernels.bench: plain versions beside ours, a table and one line of JSON

Every kernel computes and returns float64 when an input is float64, and float32 otherwise. Half
precision may come in but never goes out: rounding a log-probability to bf16 ruins PPO's ratio.
"""
