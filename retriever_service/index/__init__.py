"""Vector indexes: rows and approximate scores of the vectors nearest to a question."""
