"""Two tools that are started by path, and a sample plugin."""
