"""Chats: templates, and what an answer is made of."""
