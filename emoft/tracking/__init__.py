"""One dict of figures to every sink: the run's log, TensorBoard, the terminal; and how fast the run is."""
