"""The web page of app.py: uploads, a worker that captions for many callers at once, and how results are shown."""
