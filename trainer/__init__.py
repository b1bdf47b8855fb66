"""Fine-tuning from one recipe: SFT and GRPO-based RFT that survives losing its machine."""

__version__ = "0.1.0"
