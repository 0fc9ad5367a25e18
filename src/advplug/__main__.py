"""`python -m advplug`, as launchers start it."""

from advplug.cli import main

if __name__ == "__main__":
    main()
