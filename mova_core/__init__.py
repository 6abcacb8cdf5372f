"""MoVA: a multimodal LLM that routes between vision experts. The model and its data; needs no Ray."""

__version__ = "0.1.0"
