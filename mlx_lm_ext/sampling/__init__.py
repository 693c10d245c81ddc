"""How the next tokens of all rows are chosen: sampling parameters, penalties, and drawing on a
CPU and on a GPU. It knows no plugins."""
