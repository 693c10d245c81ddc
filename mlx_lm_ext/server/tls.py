"""TLS, with the standard library."""

import ssl
from typing import Optional


def make_context(certfile: str, keyfile: Optional[str] = None) -> ssl.SSLContext:
    """What the connections of a server are encrypted with.

    Args:
        certfile (str): The file of its certificate, with those that have signed it, in PEM.
        keyfile (Optional[str]): That of its private key. If not given, ``certfile`` has it.

    Raises:
        OSError: If they cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # Clients leave without a word, and the server ends idle connections like this. Without
    # the option, OpenSSL answers with an alert about an error.
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    # An empty password, because OpenSSL would ask for one on the terminal.
    context.load_cert_chain(certfile, keyfile, password="")
    return context
