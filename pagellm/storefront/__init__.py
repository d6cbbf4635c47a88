"""A shop page made of themed rows, without or with a language model (arXiv 2605.11118)."""
