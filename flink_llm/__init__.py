"""Language and embedding models inside Apache Flink jobs."""

__version__ = "0.1.0"
