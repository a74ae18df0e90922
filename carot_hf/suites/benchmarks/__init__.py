"""Benchmarks of shifted data by one word, declared as data."""
