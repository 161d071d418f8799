"""Offline: read a corpus, embed it, build and verify an index; the `rag-index` command."""
