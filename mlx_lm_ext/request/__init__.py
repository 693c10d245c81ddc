"""What is made of a request's body on the thread of its connection (the handler): checked
fields, the history of a chat, images, the prompt's tokens, the ``Request`` that goes to the
generation thread, the mailbox in which tokens come back, and the text of those."""
