"""The command `python -m emoft.gradients RUN_DIR`: say in plain words what is wrong with a training run."""

from emoft import errors
from emoft.gradients.diagnosis import main

errors.run(main)
