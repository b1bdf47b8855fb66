"""What `trainer check` runs in a process that may import torch."""
