"""The command `python -m emoft.step`: one optimization step of train.py's loop, shown with its real numbers."""
