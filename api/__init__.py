"""The HTTP service: routes, schemas, keys and problem details. Starts fast: never imports torch."""
