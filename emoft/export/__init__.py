"""The command `python -m emoft.export`: a saved model as one file of ONNX or GGUF, for other programs."""
