"""Pages, embeddings and features for others: terminal, files, HTTP. No stage imports it."""
