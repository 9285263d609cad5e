"""`python -m regkit` is `regkit`."""

from regkit.cli import main

if __name__ == "__main__":
    main()
