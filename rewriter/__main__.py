"""`python -m rewriter` is the command `rewriter`."""

from rewriter.cli import main

if __name__ == "__main__":
    main()
