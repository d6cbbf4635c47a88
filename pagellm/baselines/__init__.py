"""Other recommenders in the same table: searched settings, outside libraries, run files."""
