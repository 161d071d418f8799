"""The corpus in a Milvus cluster: Milvus owns vectors and documents."""
