"""What a run leaves: folders written whole or not at all, verified, and resumed exactly."""
