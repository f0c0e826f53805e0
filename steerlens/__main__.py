"""`python -m steerlens`."""

from steerlens.cli import main

main()
