"""Document stores: the passages and their exact embeddings, by row or key."""
