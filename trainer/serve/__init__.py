"""The gateway: OpenAI's API in front of an engine. No torch."""
