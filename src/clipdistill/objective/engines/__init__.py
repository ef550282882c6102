"""What computes the similarity terms: the dense engine, the tiled one, and the choice between them."""
