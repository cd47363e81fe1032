"""`python -m bomemeta`, the same as the `bomemeta` command."""

from bomemeta.cli import main

if __name__ == "__main__":
    main()
