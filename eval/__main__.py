"""`python -m cmlora.eval run ...`: the same as `cmlora evaluate run ...`, for launchers."""

import sys

from cmlora.cli.app import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]], prog_name="cmlora")
