"""From files or the Hub to batches: reading and checking rows, texts, tokens, duplicates."""
