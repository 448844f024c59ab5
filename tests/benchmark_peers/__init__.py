"""slotstream's data path beside other people's, by turns, on the same files. See `__main__`."""
