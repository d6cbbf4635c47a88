"""Raw files of many spellings -> one data set on disk (`prepare`), and back into memory (`shop`)."""
