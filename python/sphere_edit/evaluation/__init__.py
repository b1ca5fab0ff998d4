"""What a model knows, says and can do, and how its weights lie: figures of any model, edited or not."""
