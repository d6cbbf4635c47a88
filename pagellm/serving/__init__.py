"""Pages, rows and scores for others: terminal, files, HTTP, embeddings. Nothing below imports it."""
