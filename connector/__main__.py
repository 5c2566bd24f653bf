"""Lets `python -m connector` stand for the command `outbox-connector`."""

from connector.cli import main

if __name__ == "__main__":
    main()
