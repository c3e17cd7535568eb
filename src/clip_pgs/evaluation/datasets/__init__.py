"""Suites of data sets: which there are, where they lie, and which of their files are there."""
