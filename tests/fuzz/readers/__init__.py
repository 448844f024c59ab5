"""One module a reader, called like the reader, with a class `Target`; see tests.fuzz.driver."""
