"""A developer's machine: a real broker, Flink's connector, the demo, the doctor."""
