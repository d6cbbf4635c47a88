"""Everything about a run in one HTML file, and single users' pages slot by slot."""
