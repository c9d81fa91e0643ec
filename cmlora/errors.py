"""The one exception that stands for a user's mistake."""


class CmloraError(ValueError):
    """A request that cannot be carried out, with what to do about it in the message.

    The command line prints the message alone and exits with code 2; everything else is a defect
    of the program and keeps its traceback.
    """
