"""What writes a page: vocabulary, prompts, networks, decoding, plain and reward models."""
