"""Text to speech with Soprano, without PyTorch."""
