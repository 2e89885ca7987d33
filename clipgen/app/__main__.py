"""Serve the web page: ``python -m clipgen.app``. The ``app.py`` of a Hugging Face Space is the same."""

from clipgen.app.server import serve

if __name__ == "__main__":
    serve()
