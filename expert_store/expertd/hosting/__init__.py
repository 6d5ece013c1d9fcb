"""What is hosted: models and sessions, and the room that they share."""
