"""The router: worker processes that pass users' requests on to engines."""
