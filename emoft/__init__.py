"""emoft: GPT-2 fine-tuned on short emotional texts, by a training loop written out by hand."""
