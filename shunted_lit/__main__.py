"""`python -m shunted_lit` is the command `shunted-lit`."""

from shunted_lit.cli import command

if __name__ == "__main__":
    command()
