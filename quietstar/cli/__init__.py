"""Generating and chatting in the terminal."""
