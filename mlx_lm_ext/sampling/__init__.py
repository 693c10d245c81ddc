"""How the next tokens of all rows are chosen in one call: sampling parameters, penalties,
and how tokens are drawn on a CPU and on a GPU. Knows no plugins."""
