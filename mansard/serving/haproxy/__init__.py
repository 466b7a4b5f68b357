"""HAProxy as the data plane in the router's place."""
