"""The parts of ``python -m clipgen study``."""
