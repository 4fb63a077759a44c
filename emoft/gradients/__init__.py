"""What happens to gradients: measured at a step, drawn by block, and read back as a diagnosis."""
