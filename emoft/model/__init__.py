"""GPT-2 and its tokenizer: loading and saving, attention over packed rows, faster modules, generation."""
