"""The Flink functions: the async operator with `apply`, and the catalogue of ready handlers."""
