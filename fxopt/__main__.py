"""`python -m fxopt` is the command `fxopt`."""

from fxopt.cli import main

if __name__ == "__main__":
    main()
