"""Models from outside: how they are loaded, where their parts are, and how stretches of them are run."""
