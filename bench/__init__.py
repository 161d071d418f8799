"""Measurements side by side with Hugging Face; every figure in docs/benchmarks.md comes from here."""
