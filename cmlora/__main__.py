"""`python -m cmlora` is the command `cmlora`, also for `accelerate launch -m cmlora`."""

from cmlora.cli.app import main

if __name__ == "__main__":
    main()
