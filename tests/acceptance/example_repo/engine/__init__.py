"""Motors, which have nothing to do with virtual machines."""

CYLINDERS = 4
