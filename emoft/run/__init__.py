"""A run around the loop of train.py: what happens between two steps, to steps that fail, and at the end."""
