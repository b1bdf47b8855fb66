"""Rewards that a server computes, asked from the training process: language-model judges and reward servers."""
