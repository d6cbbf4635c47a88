"""PageLLM: a language model writes a person's whole recommendation page (arXiv 2506.09084).

Stages, in the order they run; each reads directories and writes one directory:

    data.prepare -> pretrain -> sft -> reward -> ppo -> evaluate

What they share, from the ground up:

    config, run          command line, errors; run directories, checkpoints, logs
    data.*               raw files of many spellings -> one data set; data.shop loads it
    vocab, prompts       text and ids -> token ids; every template
    lists, pairs         ground-truth pages, page energy; preference pairs
    backbone, networks   the networks' surface; gpt2 and llama behind it, lora beside, weights from published files
    decode               sampling, greedy, beam, one-shot under a constraint
    metrics, train       scores of pages; optimiser, schedule, keyed randomness
    recommender          pages on request, for `pagellm recommend` (terminal, files) and `pagellm serve` (HTTP)
    export, embeddings   rows and states as .npy files; their loader, which needs numpy alone

This file imports nothing, so that `python -m pagellm.ppo` loads ppo once.
"""

__version__ = "0.1.0"
