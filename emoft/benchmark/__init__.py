"""How fast emoft is, beside others and the machine's own limit: `python -m emoft.benchmark`.

Each comparison is a module. What they compare takes turns, so that a machine whose speed drifts drifts for all.
"""
