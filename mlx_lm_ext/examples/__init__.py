"""Two tools that users run against a server, and a sample plugin."""
