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
        return f"{words[:1].upper()}{words[1:]}" + ("" if words.endswith((".", "!", "?")) else ".")
    _LOG.error("unexpected failure", exc_info=error)
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "The memory is not enough for this; try a smaller picture, or fewer LoRAs."
    return f"Something went wrong ({type(error).__name__}); the server's log says what."
