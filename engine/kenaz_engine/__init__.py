"""kenaz-launcher: sessions of throw-away virtual machines, run by declared lifecycles."""

__version__ = "0.1.0"
