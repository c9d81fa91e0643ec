"""The one exception that stands for a user's mistake."""


class CmloraError(ValueError):
    """A request that cannot be carried out, with what to do about it in the message.

    The command line prints the message alone and exits with code 2; everything else is a defect
    of the program and keeps its traceback.
    """


def is_memory(failure: BaseException) -> bool:
    """Whether too little memory is what stopped a computation."""
    # the processor's allocator has no class of its own, and a graphics processor's is torch's
    known = isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError"
    return known or (isinstance(failure, RuntimeError) and "DefaultCPUAllocator" in str(failure))
