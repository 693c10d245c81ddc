"""HTTP: connections and bodies, which web pages may call, routes, and answers."""
