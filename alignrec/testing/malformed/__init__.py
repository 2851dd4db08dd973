"""Seeded malformed raw data, each piece with its expected verdict (nothing -> tests of data_prep).

Four families: ``pictures``, ``rows`` (of catalogue and log), ``tables`` (whole files) and ``web``
(addresses and servers). A verdict is the reason that the quarantine must name, or GOOD.
"""

GOOD = "good"
"""The item keeps its picture, the row stays."""


def one_of(*verdicts: str) -> frozenset[str]:
    """Return verdicts any of which is right: decoders differ in what they forgive."""
    return frozenset(verdicts)
