from clipgen.app.server import serve

serve()
