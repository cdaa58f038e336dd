"""How the processes tell what they do: log lines and traces. Knows nothing of the rest."""
