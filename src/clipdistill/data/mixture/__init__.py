"""Training data that are not pairs: pictures without captions, texts without pictures, several sets with weights."""
