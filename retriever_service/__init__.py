"""The retriever: finds the documents of a question and assembles the generator's input from them."""
