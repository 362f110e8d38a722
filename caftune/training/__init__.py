"""CAFTConfig, CAFTTrainer, and what a step costs."""
