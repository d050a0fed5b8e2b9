"""The public calls, each a page: what they do, step by step."""
