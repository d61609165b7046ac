"""Train one network: `python -m gengap_dist.train` is `gengap train`."""

from gengap_dist.compat.utf8_mode import ensure_utf8_mode

if __name__ == "__main__":
    ensure_utf8_mode()
    from gengap_dist.cli.train import main

    main()
