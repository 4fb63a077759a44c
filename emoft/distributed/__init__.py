"""Several processes that train together: who they are, whether they live, how they share a model."""
