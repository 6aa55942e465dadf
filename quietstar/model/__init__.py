"""`QuietStarForCausalLM`: any Hugging Face causal LM that thinks, with its parts."""
