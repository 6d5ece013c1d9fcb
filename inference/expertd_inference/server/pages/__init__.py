"""The pages that the server shows in a browser: a chat at ``/`` and the host at ``/host``."""
