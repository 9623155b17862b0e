"""The PyTorch door: capture of functions and modules."""
