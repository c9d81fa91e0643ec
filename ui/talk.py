"""What is said when something goes wrong."""

import logging

from cmlora.errors import CmloraError

_LOG = logging.getLogger("cmlora.ui")


def sentence(error: BaseException) -> str:
    """One line for the person in front of the page; defects also go to the log, in full.

    >>> sentence(CmloraError("no LoRA is selected"))
    'No LoRA is selected.'
    """
    if isinstance(error, CmloraError):
        words = " ".join(str(error).split())
        if words == "stopped":
            return "Stopped."
        first = words.split(" ", 1)[0]
        if first.isalpha():  # and not the name of a file
            words = f"{words[0].upper()}{words[1:]}"
        return words if words.endswith((".", "!", "?")) else f"{words}."
    _LOG.error("unexpected failure", exc_info=error)
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "The memory is not enough for this; try a smaller picture, or fewer LoRAs."
    return f"Something went wrong ({type(error).__name__}); the server's log says what."
