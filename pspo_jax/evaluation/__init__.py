"""Benchmark evaluation: statistics of sampled answers, tables and curves."""
