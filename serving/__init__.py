"""The prediction service: routes, request checks, micro-batching, the request log and the page."""
