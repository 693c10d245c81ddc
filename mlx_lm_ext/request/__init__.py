"""From the body of a request to what crosses the threads: its fields, images and prompt, the
``Request`` itself, and the mailbox for its tokens."""
