"""The one exception that users are meant to see."""


class DowncycleError(Exception):
    """A fault in what the user gave: what it was, what is needed, what to try.

    One line of text. Only the command line catches it, prints it and exits 1.
    """


class UnsuitableError(DowncycleError):
    """What was asked for can never be had of this model, whatever the machine: unlike other faults, it can be remembered."""
