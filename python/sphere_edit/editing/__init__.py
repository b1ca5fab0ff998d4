"""The editing loop: one batch after the other, each written whole or not at all."""
