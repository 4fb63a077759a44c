"""emoft: fine-tune GPT-2 on short emotional texts with a training loop written out by hand."""
