"""What writes a page: vocabulary, prompts, networks, decoding, plain recommenders, the reward model."""
