"""The same index on GPUs, where faiss has one for its kind; the CPU's stays beside it."""
