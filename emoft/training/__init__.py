"""What an optimization step is made of: label shift and loss, optimizer, precision, randomness, signals."""
