"""`python -m mmpeft` is `mmpeft`, so that `accelerate launch -m mmpeft run RECIPE` works."""

from mmpeft.cli.main import main

if __name__ == "__main__":
    main()
