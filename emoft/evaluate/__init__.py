"""How good a model and its texts are: loss, emotions told apart, text quality, and how sure each figure is."""
