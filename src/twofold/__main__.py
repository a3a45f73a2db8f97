"""`python -m twofold`, as torchrun starts it: `torchrun -m twofold ...`."""

from twofold.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
