"""The one exception that users are meant to see."""


class DowncycleError(Exception):
    """A fault in what the user gave: what it was, what is needed, what to try.

    One line of text. Only the command line catches it, prints it and exits 1.
    """
