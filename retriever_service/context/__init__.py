"""Context assembly: question + document -> context_input_ids, as Hugging Face's RagRetriever does it."""
