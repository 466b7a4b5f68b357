"""An engine: a vLLM process that serves one artifact."""
