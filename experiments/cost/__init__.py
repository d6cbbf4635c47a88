"""Benches: time and memory of every stage, and of hot paths beside other libraries."""
