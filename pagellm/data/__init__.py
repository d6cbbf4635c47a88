"""Raw files of many formats -> one data set on disk (`prepare`) -> back into memory (`shop`)."""
