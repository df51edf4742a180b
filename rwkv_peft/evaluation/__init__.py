"""Evaluation of finished models: how well they foretell texts, and which of several answers.

Figures are of whole texts, each read from the model's own start: texts of any length go through in
windows that carry the state on, and choices that share a prompt begin from its state.
"""
