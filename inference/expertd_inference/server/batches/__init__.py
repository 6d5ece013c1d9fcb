"""Many requests by one file, in OpenAI's batch format."""
