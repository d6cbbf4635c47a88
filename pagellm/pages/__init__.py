"""What a page is: truth, energy, pairs, metrics, ranked pages, statistics. No network."""
