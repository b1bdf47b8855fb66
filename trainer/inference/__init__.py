"""Use a trained model: chat, answers to a file of prompts, evaluation against another model. Samples in process."""
