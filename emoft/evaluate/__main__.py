"""The command `python -m emoft.evaluate`: a saved model on a split, and the texts that it writes."""

from emoft import errors
from emoft.evaluate.assessment import main

errors.run(main)
