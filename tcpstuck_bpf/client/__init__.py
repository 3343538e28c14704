"""The client's side: what a client's host can see and mend without touching the server."""
