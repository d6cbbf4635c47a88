"""PageLLM: a language model writes a person's whole recommendation page (arXiv 2506.09084).

Stages, in the order they run; each reads directories and writes one directory:

    data.prepare -> pretrain -> sft -> reward -> ppo -> evaluate

Folders, from the ground up; each may import what stands before it:

    kernels     log-probabilities, advantages and masked statistics over batches
    stage       what every stage is made of: command line, run directory, processes, optimiser
    data        raw files of many formats -> one prepared shop
    pages       what a page is: truth, energy, pairs, metrics, statistics; knows no network
    model       what writes a page: vocabulary, prompts, networks, decoding, reward model
    (stages)    pretrain, sft, reward, ppo (with its parts ppo_*), compose, evaluate
    serving     pages and numbers for others: terminal, files, HTTP, embeddings
    baselines   other recommenders in the same table
    online      A/B tests, a simulator, off-policy estimates, a judge
    report      everything about a run in one HTML file
    storefront  a page of themed rows, with or without a model; nothing else imports it
    presets     options that were found for a data set
    update      a trained run -> newer data, without training anew
    tuning      trials behind `pagellm tune` (tune.py) and `pagellm fit` (pipeline.py)
    python      what `import pagellm` offers: prepare, fit, load (docs/reference/python.md)

This file imports nothing before a name is asked for, so that `import pagellm` is quick and
`python -m pagellm.ppo` loads ppo once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagellm.python import Data, Model, cards, fit, load, prepare
    from pagellm.stage.config import PageLLMError

__all__ = ["Data", "Model", "PageLLMError", "__version__", "cards", "fit", "load", "prepare"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The names of `__all__`, taken from pagellm.python when they are first asked for."""
    if name in __all__:
        from pagellm import python

        return getattr(python, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
