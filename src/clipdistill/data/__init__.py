"""Pictures, captions and labels in the formats that people have, and the order in which a run sees them."""
