"""Who runs jobs: lanes hear of them, the supervisor runs each in an engine process of its own."""
