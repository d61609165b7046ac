"""Train one network: `python -m gengap_dist.train` is `gengap train`."""

from gengap_dist.cli.train import main

if __name__ == "__main__":
    main()
