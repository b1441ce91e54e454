"""Speed and memory of our models next to a Llama of equal size, in one run: ``thinkfast bench``."""
