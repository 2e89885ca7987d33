"""Serve the web page: ``python -m clipgen.app``. ``scripts/space/app.py`` is the same."""

from clipgen.app.server import serve

if __name__ == "__main__":
    serve()
