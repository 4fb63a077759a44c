"""The command `python -m emoft.compare`: which of two models is better on the same texts, and how sure that is."""
