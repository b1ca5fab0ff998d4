"""The editing loop: batch after batch, each written whole or not at all."""
