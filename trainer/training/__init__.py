"""The SFT and RFT loops and what each step is made of."""
