"""`python -m bylaw` and `torchrun ... -m bylaw`: the same as the console command `bylaw`."""

from bylaw.cli import main

if __name__ == "__main__":
    main()
