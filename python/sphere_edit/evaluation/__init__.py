"""Figures of any model, edited or not: knowledge, answers, texts, general ability, and geometry of weights."""
