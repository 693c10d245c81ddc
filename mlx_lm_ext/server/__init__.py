"""HTTP: connections, which web pages may call, routes, and the text of answers."""
