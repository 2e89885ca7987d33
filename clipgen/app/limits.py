"""Limits on what a visitor of the web page may ask for."""

from __future__ import annotations

# Images of a request, and candidates that CLIP chooses from.
MAX_IMAGES = 16
MAX_CANDIDATES = 64
# Images of a sweep over all combinations.
MAX_SWEEP_IMAGES = 64
# Characters of a prompt.
MAX_PROMPT_LENGTH = 1000
# Limits of an uploaded file.
MAX_UPLOAD_BYTES = 20 << 20
MAX_UPLOAD_PIXELS = 50_000_000
# Larger uploads are resized to this width or height in pixels.
MAX_KEPT_SIDE = 2048
# Requests that wait in the queue; further ones are refused.
MAX_QUEUE_LENGTH = 20
# Requests that have left the queue. One of them generates; the others load their models or wait.
MAX_ACTIVE = 3
# Visitors whose results are kept in memory.
MAX_SESSIONS = 100
# Age in seconds at which files and results are deleted, and the interval in seconds of looking for them.
MAX_AGE = 3600
CLEANING_INTERVAL = 300
# Models kept in memory.
MAX_MODELS = 2
