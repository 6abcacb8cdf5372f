"""Two-stage answering: the LLM routes each question, the adapter fuses the experts' features, the LLM answers."""

from mova_core.answering.answerer import Answer, Answerer, Question

__all__ = ["Answer", "Answerer", "Question"]
