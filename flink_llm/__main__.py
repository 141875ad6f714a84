"""`python -m flink_llm` is `flink-llm`."""

from flink_llm.cli import main

main(prog_name="flink-llm")
