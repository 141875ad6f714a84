"""The chaos benchmark's parts: a stack to strike at, the blows, and a checker that counts what comes out."""
