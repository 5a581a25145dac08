"""python -m spkid NAME ...: see :mod:`spkid.cli`."""

from spkid.cli import run

if __name__ == "__main__":
    run()
