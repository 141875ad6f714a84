"""Ready jobs: each has `build(env, config)` and a short `main()`, found through an entry point."""
