"""A model to share: its card, and the command `python -m emoft.share` that uploads it to the Hugging Face Hub."""
