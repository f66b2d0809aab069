"""`python -m exitify`: the command line."""

from exitify.cli import main

if __name__ == "__main__":
    main()
