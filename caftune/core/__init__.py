"""The method: heads, their losses and their targets, for any Hugging Face causal language model."""
