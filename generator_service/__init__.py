"""The generator service: question encoder, RAG-Sequence and RAG-Token decoding."""
