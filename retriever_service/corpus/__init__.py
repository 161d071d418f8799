"""Corpora: documents that can be searched and changed, generation by generation."""
