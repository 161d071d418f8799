"""The retriever as it is served, beside faiss called directly and Hugging Face's RagRetriever."""
