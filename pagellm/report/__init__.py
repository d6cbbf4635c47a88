"""One run shown to people: an HTML report, and single users' pages slot by slot."""
