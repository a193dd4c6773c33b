"""The parts of the HTTP servers: batching, request fields, answers, metrics, the app."""
