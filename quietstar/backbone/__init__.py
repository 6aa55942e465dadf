"""Any Hugging Face decoder: loading it, running it over embeddings, reading its output head."""
