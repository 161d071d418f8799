"""The demo: a corpus, questions over it, and a small trained RAG checkpoint."""
