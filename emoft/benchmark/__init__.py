"""How fast emoft is: comparisons with others and with the machine's own limit, each a module; they take turns."""
