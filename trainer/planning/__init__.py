"""Recipe and shape resolved into a frozen plan; memory predicted. No torch."""
