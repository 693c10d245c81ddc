"""The next tokens of all rows in one call: parameters, penalties, and how they are drawn on
a CPU and on a GPU. Knows no plugins."""
