"""What the HTTP servers are made of: batching, request fields, answers, metrics, the app."""
