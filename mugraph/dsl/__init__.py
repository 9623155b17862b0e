"""The front end in Python: traced tensors, functions that read like PyTorch, and hand-written block graphs."""
