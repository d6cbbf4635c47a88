"""Other recommenders in the same table: plain models, outside libraries, run files."""
