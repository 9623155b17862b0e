"""Runnable examples.  Each module has a `main()` that states and asserts its result."""
