"""`QuietStarForCausalLM`: any Hugging Face causal LM that thinks, with its parts."""

from quietstar.model.quiet_star import QuietStarForCausalLM as QuietStarForCausalLM

__all__ = ["QuietStarForCausalLM"]
