"""What the monitor measures, by the names under which the diagnosis finds it."""

# The kinds of weight in a block. Weight and bias of a kind are taken together, and so are the two LayerNorms.
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln")

NO_UPDATE = -12.0  # shown as log10 of the update ratio where nothing changed: zero has no logarithm
